package api

import (
	"encoding/json"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// This file reads requests for decisions: entities and values in Cedar's JSON, into the words of policy.

// The bounds of one request for a decision, beside that of its body.
const (
	maxUIDBytes   = 4096
	maxValueDepth = 16
)

// askedRequest returns the request that was asked for. Errors: a refusal that names the place, and repeats no value.
// Trust: in is attacker-controlled.
func askedRequest(in client.AskRequest) (*policy.Request, error) {
	out := &policy.Request{Action: in.Action}
	switch in.Action.Namespace() {
	case policy.Run, policy.Net, policy.API, policy.Access:
	default:
		return nil, badAsk("action", "its type is not Run::Action, Net::Action, Api::Action or Access::Action")
	}
	if !strings.HasSuffix(in.Action.Type, "::Action") || in.Action.ID == "" {
		return nil, badAsk("action", "it has not the form {\"type\":\"Net::Action\",\"id\":\"connect\"}")
	}
	var err error
	if out.Principal, err = askedEntity("principal", in.Principal); err != nil {
		return nil, err
	}
	if out.Resource, err = askedEntity("resource", in.Resource); err != nil {
		return nil, err
	}
	for _, other := range in.Others {
		e, err := askedEntity("others", other)
		if err != nil {
			return nil, err
		}
		out.Others = append(out.Others, e)
	}
	if out.Context, err = askedRecord("context", in.Context); err != nil {
		return nil, err
	}
	return out, nil
}

func askedEntity(place string, in client.AskEntity) (policy.Entity, error) {
	for _, uid := range append([]policy.UID{in.UID}, in.Parents...) {
		if err := checkUID(place, uid); err != nil {
			return policy.Entity{}, err
		}
	}
	attrs, err := askedRecord(place+".attrs", in.Attrs)
	return policy.Entity{UID: in.UID, Parents: in.Parents, Attrs: attrs, Tags: in.Tags}, err
}

func checkUID(place string, uid policy.UID) error {
	if uid.Type == "" || len(uid.Type) > maxUIDBytes || len(uid.ID) > maxUIDBytes {
		return badAsk(place, "an entity has no type, or a name that is too long")
	}
	return nil
}

func askedRecord(place string, in map[string]json.RawMessage) (policy.Record, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := policy.Record{}
	for _, name := range slices.Sorted(maps.Keys(in)) {
		v, err := askedValue(in[name], 0)
		if err != nil {
			return nil, badAsk(place, err.Error())
		}
		out[name] = v
	}
	return out, nil
}

var (
	errValue  = errors.New("a value is not in Cedar's JSON: a string, boolean, whole number, array, object, __entity or __extn")
	errExtn   = errors.New("an __extn is not of fn ip or datetime with an arg of that form")
	errNested = errors.New("a value nests deeper than 16 levels")
)

// askedValue reads one value. Source: Cedar's JSON format of entities and context.
func askedValue(raw json.RawMessage, depth int) (any, error) {
	if depth > maxValueDepth {
		return nil, errNested
	}
	if len(raw) == 0 {
		return nil, errValue
	}
	switch raw[0] {
	case '"':
		var s string
		err := json.Unmarshal(raw, &s)
		return s, err
	case 't', 'f':
		var b bool
		err := json.Unmarshal(raw, &b)
		return b, err
	case '[':
		var items []json.RawMessage
		if err := json.Unmarshal(raw, &items); err != nil {
			return nil, errValue
		}
		out := make([]any, len(items))
		for i, item := range items {
			v, err := askedValue(item, depth+1)
			if err != nil {
				return nil, err
			}
			out[i] = v
		}
		return out, nil
	case '{':
		return askedObject(raw, depth)
	default:
		var n int64
		if err := json.Unmarshal(raw, &n); err != nil || raw[0] == 'n' {
			return nil, errValue
		}
		return n, nil
	}
}

func askedObject(raw json.RawMessage, depth int) (any, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, errValue
	}
	if entity, ok := fields["__entity"]; ok && len(fields) == 1 {
		var uid policy.UID
		if err := json.Unmarshal(entity, &uid); err != nil || checkUID("", uid) != nil {
			return nil, errValue
		}
		return uid, nil
	}
	if extn, ok := fields["__extn"]; ok && len(fields) == 1 {
		var call struct{ Fn, Arg string }
		if err := json.Unmarshal(extn, &call); err != nil {
			return nil, errExtn
		}
		return extension(call.Fn, call.Arg)
	}
	out := policy.Record{}
	for name, field := range fields {
		v, err := askedValue(field, depth+1)
		if err != nil {
			return nil, err
		}
		out[name] = v
	}
	return out, nil
}

// extension reads an ip or datetime. A datetime may be RFC 3339 or Cedar's own shorter forms.
func extension(fn, arg string) (any, error) {
	switch fn {
	case "ip":
		if addr, err := netip.ParseAddr(arg); err == nil && addr.Zone() == "" {
			return addr, nil
		}
		if prefix, err := netip.ParsePrefix(arg); err == nil {
			return prefix, nil
		}
	case "datetime":
		for _, form := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.000Z0700", "2006-01-02T15:04:05Z0700", time.DateOnly} {
			if t, err := time.Parse(form, arg); err == nil {
				return t.UTC(), nil
			}
		}
	}
	return nil, errExtn
}

func badAsk(place, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeInvalid, What: "the request's " + place, Why: why,
		Do: "see AskRequest in /v1/openapi.json",
	}
}
