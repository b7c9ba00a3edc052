package main

import (
	"strings"
	"time"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/api/client"
)

// codeNoOperator is the refusal of a machine that holds no operator credential.
const codeNoOperator = "no-operator"

// api returns a client of the management API, with the operator's credential from the data directory.
func (c *cli) api() (*client.Client, error) {
	o, err := redoubt.LoadOperator(c.roleDir("server", redoubt.OperatorFile))
	if err != nil {
		return nil, err
	}
	base := o.Server
	if c.server != "" {
		base = c.server
	}
	return client.New(client.Config{
		Base: base, Roots: []byte(o.CA), Credential: client.Credential(o.Credential), UserAgent: "redoubt/" + version,
	})
}

// withAPI calls fn with a client.
func (c *cli) withAPI(fn func(api *client.Client) error) error {
	api, err := c.api()
	if err != nil {
		return err
	}
	defer api.Close()
	return fn(api)
}

// duration reads "5m", "1h30m" or ISO 8601's "PT5M"; "" is zero.
func duration(flag, s string) (client.Duration, error) {
	if s == "" {
		return 0, nil
	}
	if strings.HasPrefix(s, "P") {
		d, err := client.ParseDuration(s)
		if err != nil {
			return 0, usagef("--%s %q: %v", flag, s, err)
		}
		return d, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, usagef("--%s %q is not a duration such as 5m or PT5M", flag, s)
	}
	if d <= 0 {
		return 0, usagef("--%s %q: it must be longer than nothing", flag, s)
	}
	return client.Duration(d), nil
}

// serverDir is the server's data directory, for verbs that work on its files.
func (c *cli) serverDir() string { return c.roleDir("server", redoubt.DatabaseFile) }

// collect reads every page of a list.
func collect[T any](seq func(func(T, error) bool)) ([]T, error) {
	out := []T{}
	var failure error
	seq(func(v T, err error) bool {
		if err != nil {
			failure = err
			return false
		}
		out = append(out, v)
		return true
	})
	return out, failure
}
