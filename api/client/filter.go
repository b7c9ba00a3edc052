package client

import (
	"fmt"
	"net/url"
	"reflect"
	"time"
)

// Paging says which page of a list. Zero value: the first page, of the default size.
type Paging struct {
	Limit  int    `query:"limit" minimum:"1" maximum:"500" default:"100" doc:"How many items at most."`
	Cursor string `query:"cursor" maxLength:"1024" doc:"The next member of the page before; absent for the first page."`
}

// WorkloadFilter selects workloads. The zero value of a field does not restrict; so for every filter.
type WorkloadFilter struct {
	Machine  string `query:"machine" maxLength:"63" doc:"Only on this machine."`
	Service  string `query:"service" maxLength:"128" doc:"Only of this service."`
	Identity string `query:"identity" maxLength:"2048" doc:"Only those with this SPIFFE ID."`
	State    string `query:"state" enum:"present,gone" doc:"Only those in this state."`
}

// ProtectionFilter selects protections.
type ProtectionFilter struct {
	Machine  string `query:"machine" maxLength:"63" doc:"Only of this machine."`
	Workload string `query:"workload" maxLength:"128" doc:"Only of this instance."`
	State    string `query:"state" enum:"enforced,observed,not enforceable" doc:"Only those in this state."`
}

// DecisionFilter selects decisions.
type DecisionFilter struct {
	Workload string `query:"workload" maxLength:"128" doc:"Only about this instance, w-…"`
	Machine  string `query:"machine" maxLength:"63" doc:"Only of this machine, or of \"server\"."`
	Verdict  string `query:"verdict" enum:"permit,deny" doc:"Only with this verdict."`
	Layer    string `query:"layer" enum:"runtime,network,api,access" doc:"Only of this layer."`
}

// EventFilter selects events.
type EventFilter struct {
	Machine  string    `query:"machine" maxLength:"63" doc:"Only from this machine, or \"server\"."`
	Workload string    `query:"workload" maxLength:"128" doc:"Only about this instance, w-…"`
	Identity string    `query:"identity" maxLength:"2048" doc:"Only about this SPIFFE ID."`
	Layer    string    `query:"layer" enum:"runtime,network,api,access,control" doc:"Only of this layer."`
	Kind     string    `query:"kind" maxLength:"128" doc:"Only of this kind, such as workload.started."`
	Decision string    `query:"decision" maxLength:"64" doc:"Only about this decision, d-…"`
	Verdict  string    `query:"verdict" enum:"permit,deny" doc:"Only with this verdict."`
	Since    time.Time `query:"since" doc:"Only at or after this time (RFC 3339)."`
	Until    time.Time `query:"until" doc:"Only before this time (RFC 3339)."`
}

// encode adds what a filter says to a query. Fields are strings, times and integers.
func encode(query url.Values, filter any) {
	v := reflect.ValueOf(filter)
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("query")
		if name == "" || v.Field(i).IsZero() {
			continue
		}
		if t, ok := reflect.TypeAssert[time.Time](v.Field(i)); ok {
			query.Set(name, t.UTC().Format(time.RFC3339Nano))
			continue
		}
		query.Set(name, fmt.Sprint(v.Field(i).Interface()))
	}
}
