package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// Client speaks with the agent of this machine. Concurrency: safe. Errors are refusals; "agent-away" if nobody answers.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the socket at path. It connects with the first call.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", path)
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// The time limits of calls: an agent that hangs must not hang whoever calls it, least of all the break-glass.
const (
	callWithin    = 60 * time.Second
	releaseWithin = 10 * time.Second
)

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status returns the machine's summary.
func (c *Client) Status(ctx context.Context) (out machine.Status, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/status", nil, &out)
}

// Workloads returns the workloads of this machine.
func (c *Client) Workloads(ctx context.Context) (out []machine.Workload, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/workloads", nil, &out)
}

// Workload returns one workload.
func (c *Client) Workload(ctx context.Context, instance string) (out machine.Workload, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/workloads/"+url.PathEscape(instance), nil, &out)
}

// Prepare makes room for a workload.
func (c *Client) Prepare(ctx context.Context, in Prepare) (out Prepared, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/workloads", in, &out)
}

// Started tells of the first process of a prepared workload.
func (c *Client) Started(ctx context.Context, instance string, pid int) (out machine.Workload, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/workloads/"+url.PathEscape(instance)+"/started", Started{PID: pid}, &out)
}

// Ended tells that a workload is over.
func (c *Client) Ended(ctx context.Context, instance string) error {
	return c.call(ctx, http.MethodPost, "/v1/workloads/"+url.PathEscape(instance)+"/ended", none{}, nil)
}

// Forget ends the identity of a workload that goes on.
func (c *Client) Forget(ctx context.Context, instance string) error {
	return c.call(ctx, http.MethodPost, "/v1/workloads/"+url.PathEscape(instance)+"/forget", none{}, nil)
}

// Enroll adopts what runs.
func (c *Client) Enroll(ctx context.Context, in Enroll) (out machine.Workload, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/enroll", in, &out)
}

// Explain returns what a process, cgroup or workload is attested as, and which rules apply.
func (c *Client) Explain(ctx context.Context, name string) (out json.RawMessage, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/explain?name="+url.QueryEscape(name), nil, &out)
}

// Decide asks the machine's own policy.
func (c *Client) Decide(ctx context.Context, req policy.Request) (out Decision, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/decisions", req, &out)
}

// Decision returns a decision that was made on this machine.
func (c *Client) Decision(ctx context.Context, id policy.ID) (out *policy.Decision, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/decisions/"+url.PathEscape(string(id)), nil, &out)
}

// Release pulls or puts back the break-glass.
func (c *Client) Release(ctx context.Context, in Release) (out *machine.Release, err error) {
	ctx, cancel := context.WithTimeout(ctx, releaseWithin)
	defer cancel()
	return out, c.call(ctx, http.MethodPost, "/v1/release", in, &out)
}

// Protections returns the truth about this machine.
func (c *Client) Protections(ctx context.Context) (out []policy.Protection, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/protections", nil, &out)
}

// Doctor returns the capability ledger.
func (c *Client) Doctor(ctx context.Context) (out json.RawMessage, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/doctor", nil, &out)
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.away(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return c.away(err)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		var p client.Problem
		if err := json.Unmarshal(raw, &p); err != nil {
			return fmt.Errorf("the agent answered %s with no problem document", resp.Status)
		}
		if r := p.Refusal(); r != nil {
			return r
		}
		return &p
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(raw, out)
}

func (c *Client) away(err error) error {
	why, do := "nothing answers there: "+err.Error(), "start it with redoubt agent or redoubt dev, or name its data directory with --data"
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &refusal.Error{
			Kind: refusal.Unavailable, Code: "agent-slow", What: "call the agent at " + c.path, Why: "it does not answer in time",
			Do:  "try again, and look into its log; should redoubt release not be answered either, end the agent (kill -9): release works without it",
			Err: err,
		}
	case errors.Is(err, context.Canceled):
		why, do = "the call was interrupted", "run it again"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		why = "no agent is running"
	case errors.Is(err, fs.ErrPermission):
		why, do = "only root may speak with it", "run the command as root"
	}
	return &refusal.Error{Kind: refusal.Unavailable, Code: "agent-away", What: "reach the agent at " + c.path, Why: why, Do: do, Err: err}
}
