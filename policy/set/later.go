package set

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// This file reads the kinds whose acting points are not built yet: Route, Issuer and Response. They are validated as
// strictly as the others, and [Unenforced] says that nothing acts on them.

// The bounds of these documents.
const (
	maxRoutes     = 1000
	maxHosts      = 16 // of one route; times paths, what is compared
	maxPaths      = 32
	maxPath       = 512
	maxAudiences  = 32
	maxURL        = 2048
	maxSignals    = 64
	maxRouteTime  = time.Hour
	maxResponding = 30 * 24 * time.Hour
)

var methods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

var routePath = regexp.MustCompile(`^/([A-Za-z0-9._~!$&'()*+,;=:@-]+(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)*/?)?$`)

// routePrefix says what is wrong with a path prefix. Dot segments and encodings are refused, since two readers of them
// may disagree (RFC 3986, sections 3.3 and 5.2.4).
func routePrefix(s string) string {
	if !routePath.MatchString(s) {
		return "it is no plain path that begins with a slash"
	}
	for segment := range strings.SplitSeq(s, "/") {
		if segment == "." || segment == ".." {
			return "it has a relative segment"
		}
	}
	return ""
}

func (d *documents) readRoute(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "hosts", "paths", "methods", "service", "strip_prefix", "timeout")
	if o == nil {
		return
	}
	o.need("hosts", "list the host names that it answers to")
	o.need("service", "name the service that it leads to")
	route := Route{
		Document:    doc,
		Hosts:       o.texts("hosts", maxHosts, maxHostName+2, "write it like shop.example.com or *.example.com", hostPattern),
		Paths:       o.texts("paths", maxPaths, maxPath, "write it like /orders, without encoded characters", routePrefix),
		Methods:     o.choices("methods", methods...),
		Service:     o.name("service"),
		StripPrefix: o.boolean("strip_prefix"),
		Timeout:     o.duration("timeout", time.Second, maxRouteTime),
	}
	if len(route.Paths) == 0 {
		route.Paths = []string{"/"}
	}
	if len(d.routes) >= maxRoutes {
		r.fail(spec, CodeBounds, "spec", fmt.Sprintf("there are more than %d routes", maxRoutes), "join some of them")
		return
	}
	if other, at := d.clash(&route); other != nil {
		// Names, not secrets: a host and a path that clients ask for.
		r.fail(spec, CodeDuplicate, "spec", "Route/"+other.Name+" answers "+at+" for the same methods", "let each request have one route")
	}
	d.routes = append(d.routes, route)
}

// clash returns a route before this one that answers the same host, path and method, and where, or nil. It remembers a.
func (d *documents) clash(a *Route) (other *Route, at string) {
	if d.answered == nil {
		d.answered = map[string][]*Route{}
	}
	for _, host := range a.Hosts {
		for _, path := range a.Paths {
			key := host + path
			for _, b := range d.answered[key] {
				if len(a.Methods) == 0 || len(b.Methods) == 0 || slices.ContainsFunc(a.Methods, func(m string) bool { return slices.Contains(b.Methods, m) }) {
					return b, key
				}
			}
			// A few at most: routes of one key that do not clash have different methods.
			d.answered[key] = append(d.answered[key], a)
		}
	}
	return nil, ""
}

// secureURL says what is wrong with the URL of an issuer. Source: OpenID Connect Discovery 1.0, section 2; RFC 8414,
// section 2: https, no query and no fragment.
func secureURL(s string) string {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.Opaque != "":
		return "it is no URL"
	case u.Scheme != "https":
		return "it is not https"
	case u.User != nil:
		return "it has a user or password"
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#"):
		return "it has a query or fragment"
	}
	return ""
}

func (o *object) url(key string) string {
	s := o.text(key, maxURL)
	if s == "" {
		return ""
	}
	if why := secureURL(s); why != "" {
		o.bad(key, why, "write it like https://idp.example.com/path")
		return ""
	}
	return s
}

// algorithms are the signatures accepted, in order of preference. HMAC and none are never accepted (RFC 8725, 3.1).
var algorithms = []string{"ES256", "EdDSA", "RS256", "PS256", "ES384", "ES512", "RS384", "PS384", "RS512", "PS512"}

func (d *documents) readIssuer(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "url", "audiences", "jwks_url", "algorithms", "claims", "client_id", "client_secret_file")
	if o == nil {
		return
	}
	o.need("url", "give the issuer's URL, exactly as its tokens have it in iss")
	o.need("audiences", "list the audiences accepted; a token for somebody else is no credential here")
	i := Issuer{
		Document: doc, URL: o.url("url"), JWKSURL: o.url("jwks_url"),
		Audiences:  o.texts("audiences", maxAudiences, maxURL, "give different texts", func(string) string { return "" }),
		Algorithms: o.choices("algorithms", algorithms...), ClientID: o.text("client_id", maxURL),
		ClientSecretFile: o.text("client_secret_file", maxPath),
	}
	if len(i.Algorithms) == 0 {
		i.Algorithms = slices.Clone(algorithms[:4])
	}
	if i.ClientSecretFile != "" && !strings.HasPrefix(i.ClientSecretFile, "/") {
		o.bad("client_secret_file", "it is no absolute path", "give the path of a file on the server")
	}
	if n := o.fields["claims"]; n != nil {
		if claims := r.object(n, o.at("claims"), "user", "email", "groups", "roles", "name"); claims != nil {
			i.Claims = map[string]string{}
			for _, key := range claims.keys() {
				i.Claims[key] = claims.text(key, maxName)
			}
		}
	}
	for _, other := range d.issuers {
		if i.URL != "" && other.URL == i.URL {
			o.bad("url", "Issuer/"+other.Name+" has the same URL", "declare each issuer once")
		}
	}
	d.issuers = append(d.issuers, i)
}

func (d *documents) readResponse(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "when", "for", "actions", "lasts")
	if o == nil {
		return
	}
	o.need("actions", "list one or more of: quarantine, revoke, end-sessions, notify")
	resp := Response{
		Document: doc, For: Selector{All: true}, Actions: o.choices("actions", "quarantine", "revoke", "end-sessions", "notify"),
		Lasts: o.duration("lasts", time.Minute, maxResponding),
	}
	if o.need("when", "say at which score, layers or signals") {
		if w := r.object(o.fields["when"], o.at("when"), "score", "layers", "signals"); w != nil {
			w.need("score", "give the least score, 1 to 100")
			resp.Score = int(w.integer("score", 1, 100, 100))
			resp.Layers = w.choices("layers", "runtime", "network", "api", "access")
			resp.Signals = w.names("signals", maxSignals)
		}
	}
	if n := o.fields["for"]; n != nil {
		resp.For = r.selector(n, o.at("for"))
	}
	d.responses = append(d.responses, resp)
}
