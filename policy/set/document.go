package set

import (
	"net/netip"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/redoubtsec/redoubt/policy"
)

// The kinds of YAML documents.
const (
	KindIssuanceRule = "IssuanceRule"
	KindService      = "Service"
	KindAddress      = "Address"
	KindMode         = "Mode"
	KindRoute        = "Route"
	KindIssuer       = "Issuer"
	KindResponse     = "Response"
)

// Document says where a document of a set stands.
type Document struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
	File string `json:"file"`
	Line int    `json:"line,omitempty"` // of its first key; 0 of a policy
}

// String renders "Mode/all".
func (d Document) String() string { return d.Kind + "/" + d.Name }

// Service declares a part of the system: its groups, for policies that say `in Group::"…"`, and where it listens.
//
//	kind: Service
//	name: orders
//	spec:
//	  description: takes orders     # free text
//	  owner: team-shop              # becomes the entity's attribute
//	  groups: [backend]             # parents of Service::"orders"
//	  endpoints:
//	    - {address: 10.0.0.5, port: 8080, protocol: http, machine: m1}
//	  openapi: {openapi: 3.1.0, …}  # the document itself; nothing is fetched
//
// A service that has no document is known all the same, by the workloads that name it.
type Service struct {
	Document
	Description string
	Owner       string
	Groups      []string
	Endpoints   []Endpoint
	OpenAPI     []byte // JSON; nil if there is none
}

// Endpoint is where a service can be reached that no agent sees listening.
//
// Shape: Address is an IP address or a host name; Machine is empty where no agent runs.
type Endpoint struct {
	Address  string `json:"address"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"` // http or tcp, as declared; nothing is sniffed
	Machine  string `json:"machine,omitempty"`
}

// Address declares destinations that are no services, under one name: Address::"partners".
//
//	kind: Address
//	name: partners
//	spec:
//	  cidrs: [192.0.2.0/24, 2001:db8::/32]
//	  names: [api.example.com, "*.example.net"]
//	  groups: [outside]             # parents of Address::"partners"
//
// A literal address or host name within it has Address::"partners" as a parent in every decision.
type Address struct {
	Document
	Description string
	CIDRs       []netip.Prefix
	Names       []string // lower-case host names; "*.x" is any name below x
	Groups      []string
}

// Mode says in which namespaces the workloads it selects are enforced or observed.
//
//	kind: Mode
//	name: orders-enforced
//	spec:
//	  for: {service: orders, machine: m1, labels: {stage: live}}   # or {all: true}
//	  namespaces: [Run, Net]
//	  mode: enforce
//
// A request concerns the workload that acts and the one acted on; a mode counts if it selects either. Of those that
// count the one that names most properties wins, and of equals, enforce. Access is always enforced: a Mode may say so,
// and is refused if it says observe.
type Mode struct {
	Document
	For        Selector
	Namespaces []string
	Mode       policy.Mode
}

// Route leads requests from outside to a service; the gateway acts on it.
//
//	kind: Route
//	name: shop
//	spec:
//	  hosts: [shop.example.com]
//	  paths: [/orders]              # prefixes of whole segments; default /
//	  methods: [GET, POST]          # default all
//	  service: orders
//	  strip_prefix: true
//	  timeout: 30s
type Route struct {
	Document
	Hosts       []string
	Paths       []string
	Methods     []string // empty: all
	Service     string
	StripPrefix bool
	Timeout     time.Duration // 0: the gateway's default
}

// Issuer is an OpenID or OAuth issuer whose tokens are trusted; tokens and logins act on it.
//
//	kind: Issuer
//	name: corp
//	spec:
//	  url: https://idp.example.com
//	  audiences: [redoubt]
//	  jwks_url: https://idp.example.com/keys   # default: by discovery
//	  algorithms: [ES256, EdDSA]               # default ES256, EdDSA, RS256, PS256
//	  claims: {user: sub, groups: groups}
//	  client_id: redoubt
//	  client_secret_file: /etc/redoubt/corp.secret   # a file on the server; never the secret itself
type Issuer struct {
	Document
	URL              string
	Audiences        []string
	JWKSURL          string
	Algorithms       []string
	Claims           map[string]string // what → claim
	ClientID         string
	ClientSecretFile string
}

// Response says what Redoubt does by itself about an incident; detection acts on it.
//
//	kind: Response
//	name: cut-off
//	spec:
//	  when: {score: 80, layers: [runtime, network], signals: [reverse-shell]}
//	  for: {all: true}              # default all
//	  actions: [quarantine, notify]
//	  lasts: 1h                     # default until lifted
type Response struct {
	Document
	Score   int // least score of the incident, 1 to 100
	Layers  []string
	Signals []string
	For     Selector
	Actions []string
	Lasts   time.Duration
}

// documents is every document of a set, in order of file and line.
type documents struct {
	rules     []*IssuanceRule
	services  []Service
	addresses []Address
	modes     []Mode
	routes    []Route
	issuers   []Issuer
	responses []Response
	seen      map[string]Document // by kind/name
	answered  map[string][]*Route // by host and path
}

var kinds = []string{KindIssuanceRule, KindService, KindAddress, KindMode, KindRoute, KindIssuer, KindResponse}

// read adds the document in this chunk of a file.
func (d *documents) read(file string, c chunk, found *findings) {
	r := &reader{place: place{file: file}, found: found, offset: c.line - 1}
	root := r.parse(c.text)
	if root == nil {
		return
	}
	if root.Kind == yaml.MappingNode {
		// The place is read before anything is checked, so that every problem can name it.
		r.kind, r.name = peek(root, "kind"), peek(root, "name")
	}
	o := r.object(root, "", "kind", "name", "spec")
	if o == nil {
		return
	}
	named := o.need("name", "give the document a name, unique among those of its kind")
	if !o.need("kind", "use one of: "+strings.Join(kinds, ", ")) {
		return
	}
	kind := o.text("kind", maxName)
	if named && o.name("name") == "" {
		named = false
	}
	if !o.need("spec", "put what it says under spec") || kind == "" {
		return
	}
	doc := Document{Kind: kind, Name: r.name, File: file, Line: r.offset + root.Line}
	if first, twice := d.seen[doc.String()]; twice && named {
		r.fail(root, CodeDuplicate, "name", "there is a document of this kind and name at "+place{file: first.File}.what(first.Line, ""),
			"rename one of them")
	} else if named {
		d.seen[doc.String()] = doc
	}
	spec := o.fields["spec"]
	switch kind {
	case KindIssuanceRule:
		d.readRule(r, doc, spec)
	case KindService:
		d.readService(r, doc, spec)
	case KindAddress:
		d.readAddress(r, doc, spec)
	case KindMode:
		d.readMode(r, doc, spec)
	case KindRoute:
		d.readRoute(r, doc, spec)
	case KindIssuer:
		d.readIssuer(r, doc, spec)
	case KindResponse:
		d.readResponse(r, doc, spec)
	default:
		r.fail(o.fields["kind"], CodeKind, "kind", "there is no such kind", "use one of: "+strings.Join(kinds, ", "))
	}
}

// peek returns the text of a key if it is a plain name, for messages.
func peek(n *yaml.Node, key string) string {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if v := n.Content[i+1]; n.Content[i].Value == key && v.Kind == yaml.ScalarNode && v.Tag == "!!str" && isName(v.Value) {
			return v.Value
		}
	}
	return ""
}
