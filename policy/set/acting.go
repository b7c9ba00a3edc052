package set

import (
	"encoding/json"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// This file reads the kinds that are acted on: Service, Address and Mode (IssuanceRule is in rule.go).

// The bounds of documents.
const (
	maxFreeText  = 1024
	maxGroups    = 64
	maxEndpoints = 256
	maxCIDRs     = 1024
	maxHostNames = 1024
	maxOpenAPI   = 1 << 20 // of its JSON
)

func (d *documents) readService(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "description", "owner", "groups", "endpoints", "openapi")
	if o == nil {
		return
	}
	s := Service{
		Document: doc, Description: o.text("description", maxFreeText), Owner: o.text("owner", maxName),
		Groups: o.names("groups", maxGroups),
	}
	for i, n := range o.list("endpoints", maxEndpoints) {
		e := r.object(n, o.at("endpoints")+"["+strconv.Itoa(i)+"]", "address", "port", "protocol", "machine")
		if e == nil {
			continue
		}
		e.need("address", "give an IP address or a host name")
		e.need("port", "give a port from 1 to 65535")
		e.need("protocol", "give http or tcp")
		end := Endpoint{
			Address: e.text("address", maxHostName), Port: uint16(e.integer("port", 1, 65535, 0)),
			Protocol: e.choice("protocol", "http", "tcp"), Machine: e.name("machine"),
		}
		if _, err := netip.ParseAddr(end.Address); end.Address != "" && err != nil && !isHost(end.Address) {
			e.bad("address", "it is neither an IP address nor a host name", "give one, without port and scheme")
		}
		s.Endpoints = append(s.Endpoints, end)
	}
	if n := o.fields["openapi"]; n != nil {
		s.OpenAPI = r.openAPI(n, o.at("openapi"))
	}
	d.services = append(d.services, s)
}

// openAPI checks the outline of an OpenAPI document and returns it as JSON. Source: OpenAPI 3.1.0, section 4.8.
func (r *reader) openAPI(n *yaml.Node, path string) []byte {
	o := r.mapping(n, path)
	if o == nil {
		return nil
	}
	if o.need("openapi", "give the version, 3.0.x or 3.1.x") {
		if v := o.text("openapi", maxName); v != "" && !openAPIVersion.MatchString(v) {
			o.bad("openapi", "its version is not 3.0.x or 3.1.x", "convert the document")
		}
	}
	if o.need("paths", "declare the paths of the service") {
		r.openAPIPaths(o)
	}
	r.localRefs(n, path)
	text, err := json.Marshal(r.plain(n, path))
	if err != nil || len(text) > maxOpenAPI {
		r.fail(n, CodeBounds, path, "it is larger than "+strconv.Itoa(maxOpenAPI)+" bytes", "shorten it")
		return nil
	}
	return text
}

var openAPIVersion = regexp.MustCompile(`^3\.[01]\.[0-9]+$`)

func (r *reader) openAPIPaths(o *object) {
	paths := r.mapping(o.fields["paths"], o.at("paths"))
	if paths == nil {
		return
	}
	operations := map[string]bool{}
	for _, key := range paths.keys() {
		item := paths.fields[key]
		if strings.HasPrefix(key, "x-") {
			continue
		}
		if !strings.HasPrefix(key, "/") {
			r.fail(item, CodeValue, paths.path, "a path does not begin with a slash", "write it like /orders/{id}")
			continue
		}
		methods := r.object(item, paths.path+"."+pathName(key), "get", "put", "post", "delete", "options", "head", "patch",
			"trace", "parameters", "summary", "description", "servers", "$ref")
		if methods == nil {
			continue
		}
		for _, method := range methods.keys() {
			n := methods.fields[method]
			if n.Kind != yaml.MappingNode || method == "servers" || method == "parameters" {
				continue
			}
			id := peek(n, "operationId")
			if id != "" && operations[id] {
				r.fail(n, CodeDuplicate, methods.at(method)+".operationId", "another operation has the same id", "give each its own")
			}
			operations[id] = true
		}
	}
}

// pathName renders a path of an OpenAPI document for a message.
func pathName(s string) string {
	if plainPath.MatchString(s) {
		return s
	}
	return "(a path)"
}

var plainPath = regexp.MustCompile(`^/[A-Za-z0-9._~{}/-]{0,127}$`)

// localRefs refuses references out of the document: nothing is ever fetched.
func (r *reader) localRefs(n *yaml.Node, path string) {
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 1 && n.Content[i-1].Value == "$ref" && c.Kind == yaml.ScalarNode && !strings.HasPrefix(c.Value, "#/") {
			r.fail(c, CodeValue, path, "a $ref leads out of the document", "put what it names into the document and refer to #/…")
		}
		r.localRefs(c, path)
	}
}

// maxHostName bounds host names (RFC 1035, section 2.3.4).
const maxHostName = 253

var hostName = regexp.MustCompile(`^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func isHost(s string) bool { return len(s) <= maxHostName && hostName.MatchString(s) }

// hostPattern says what is wrong with a lower-case host name or "*." and one.
func hostPattern(s string) string {
	if !isHost(strings.TrimPrefix(s, "*.")) {
		return "it is no lower-case host name, nor *. and one"
	}
	return ""
}

func (d *documents) readAddress(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "description", "cidrs", "names", "groups")
	if o == nil {
		return
	}
	a := Address{Document: doc, Description: o.text("description", maxFreeText), Groups: o.names("groups", maxGroups)}
	if !o.has("cidrs") && !o.has("names") {
		r.fail(spec, CodeKey, "spec", "it declares neither cidrs nor names", "give at least one of them")
	}
	if _, err := netip.ParseAddr(doc.Name); err == nil {
		// Address::"10.0.0.1" is the literal address in every decision; a document must not pass for one.
		r.fail(spec, CodeReserved, "name", "the name is an IP address", "give it a name of its own")
	}
	o.texts("cidrs", maxCIDRs, maxName, "write it like 192.0.2.0/24 or 2001:db8::/32", func(s string) string {
		p, err := netip.ParsePrefix(s)
		switch {
		case err != nil || p.Addr().Is4In6():
			return "it is no range of addresses"
		case p.Masked() != p:
			return "it has bits beyond its length: the range is " + p.Masked().String()
		}
		a.CIDRs = append(a.CIDRs, p)
		return ""
	})
	a.Names = o.texts("names", maxHostNames, maxHostName+2, "write it like api.example.com or *.example.com", hostPattern)
	d.addresses = append(d.addresses, a)
}

// contains reports whether the address or host name lies within a.
func (a *Address) contains(ip netip.Addr, host string) bool {
	for _, p := range a.CIDRs {
		if ip.IsValid() && p.Contains(ip) {
			return true
		}
	}
	for _, n := range a.Names {
		if below, any := strings.CutPrefix(n, "*"); host != "" && (host == n || any && strings.HasSuffix(host, below) && len(host) > len(below)) {
			return true
		}
	}
	return false
}

func (d *documents) readMode(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "for", "namespaces", "mode")
	if o == nil {
		return
	}
	m := Mode{Document: doc}
	if o.need("for", "say which workloads: {all: true}, or service, machine, labels") {
		m.For = r.selector(o.fields["for"], o.at("for"))
	}
	if o.need("namespaces", "list one or more of Run, Net, Api, Access") {
		m.Namespaces = o.choices("namespaces", policy.Run, policy.Net, policy.API, policy.Access)
	}
	if o.need("mode", "give enforce or observe") {
		m.Mode = policy.Mode(o.choice("mode", string(policy.Enforce), string(policy.Observe)))
	}
	for _, ns := range m.Namespaces {
		if ns == policy.Access && m.Mode == policy.Observe {
			o.bad("namespaces", "Access is never observed: every refused login and every management call would go through",
				"leave Access out; to try a policy on it use redoubt policy test")
		}
	}
	d.modes = append(d.modes, m)
}

// selector reads {all: true} or any of service, machine and labels.
func (r *reader) selector(n *yaml.Node, path string) Selector {
	o := r.object(n, path, "all", "service", "machine", "labels")
	if o == nil {
		return Selector{}
	}
	s := Selector{All: o.boolean("all"), Service: o.text("service", maxName), Machine: o.text("machine", maxName)}
	if l := o.fields["labels"]; l != nil {
		if labels := r.mapping(l, o.at("labels")); labels != nil {
			s.Labels = map[string]string{}
			for _, key := range labels.keys() {
				s.Labels[key] = labels.text(key, maxLabelValue)
			}
		}
	}
	if err := s.Check(); err != nil {
		e := refusal.As(err)
		r.fail(n, CodeValue, path, e.Why, e.Do)
	}
	return s
}
