package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy/set"
)

func (c *cli) identityVerb() *cobra.Command {
	cmd := &cobra.Command{Use: "identity", Short: "Explain identities, and fetch one's own"}
	cmd.AddCommand(c.identityExplain(), c.identityFetch(), c.identityToken())
	return cmd
}

// explainedIdentity is the agent's answer to `identity explain`.
type explainedIdentity struct {
	Workload *machine.Workload `json:"workload,omitempty"`
	Facts    identity.FactSet  `json:"facts"`
	Warnings []string          `json:"warnings,omitempty"`
	Issuance *set.Issuance     `json:"issuance,omitempty"`
	Identity identity.ID       `json:"identity,omitzero"`
	Refusal  string            `json:"refusal,omitempty"`
}

func (e explainedIdentity) print(w io.Writer) {
	if e.Workload != nil {
		_, _ = fmt.Fprintf(w, "workload  %s in %s, by %s\n", e.Workload.Instance, printable(e.Workload.Cgroup), e.Workload.How)
	}
	switch {
	case !e.Identity.IsZero():
		_, _ = fmt.Fprintf(w, "identity  %s\n", e.Identity)
	case e.Refusal != "":
		_, _ = fmt.Fprintf(w, "identity  none: %s\n", printable(e.Refusal))
	default:
		_, _ = fmt.Fprintln(w, "identity  none yet: the server has not answered")
	}
	for _, f := range e.Facts.All() {
		_, _ = fmt.Fprintf(w, "fact      %s = %s  (%s, epoch %d)\n", f.Name, printable(fmt.Sprint(f.Value)), f.Source, f.Epoch)
	}
	for _, warning := range e.Warnings {
		_, _ = fmt.Fprintf(w, "warning   %s\n", printable(warning))
	}
	if e.Issuance == nil {
		return
	}
	for _, r := range e.Issuance.Rules {
		verdict := "no"
		switch {
		case r.Won:
			verdict = "WON"
		case r.Matched:
			verdict = "matched"
		}
		_, _ = fmt.Fprintf(w, "rule      %s (%s, priority %d): %s; %s\n", printable(r.Rule), printable(r.File), r.Priority, verdict, printable(r.Why))
	}
}

func (c *cli) identityExplain() *cobra.Command {
	return &cobra.Command{
		Use:   "explain PID|CGROUP|NAME",
		Short: "Say what something that runs is attested as, and which rule gives it which identity",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			agent := c.agent()
			defer agent.Close()
			raw, err := agent.Explain(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var e explainedIdentity
			if err := json.Unmarshal(raw, &e); err != nil {
				return err
			}
			return c.show(raw, e.print)
		},
	}
}

// workloadAPI returns a client of the Workload API for whoever runs this.
func workloadAPI(ctx context.Context) (*workload.Client, context.Context, context.CancelFunc, error) {
	client, err := workload.NewClient(os.Getenv("SPIFFE_ENDPOINT_SOCKET"))
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, workload.FetchTimeout)
	return client, ctx, cancel, nil
}

func (c *cli) identityFetch() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "fetch [--write DIR]",
		Short: "Fetch the identity of this very process from the Workload API",
		Long: "Fetches the X.509-SVID of the process that runs this command: inside a workload, the workload's own. With --write it is\n" +
			"written as svid.pem, svid.key (0600) and bundle.pem, for programs that read files.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, ctx, cancel, err := workloadAPI(cmd.Context())
			if err != nil {
				return err
			}
			defer cancel()
			defer func() { _ = client.Close() }()
			svids, roots, err := client.FetchX509(ctx)
			if err != nil {
				return err
			}
			type fetched struct {
				ID      identity.ID `json:"spiffe_id"`
				Expires time.Time   `json:"expires"`
				Serial  string      `json:"serial"`
			}
			var list []fetched
			for _, s := range svids {
				list = append(list, fetched{s.ID, s.Expires().UTC(), s.Chain[0].SerialNumber.Text(16)})
			}
			if dir != "" {
				if err := writeSVID(dir, svids[0], roots); err != nil {
					return err
				}
			}
			return c.show(list, func(w io.Writer) {
				for _, s := range list {
					_, _ = fmt.Fprintf(w, "%s  expires %s\n", s.ID, when(s.Expires))
				}
			})
		},
	}
	cmd.Flags().StringVar(&dir, "write", "", "directory to write svid.pem, svid.key and bundle.pem to")
	return cmd
}

func writeSVID(dir string, svid *identity.X509SVID, roots []*x509.Certificate) error {
	key, err := x509.MarshalPKCS8PrivateKey(svid.Key)
	if err != nil {
		return err
	}
	encode := func(certs []*x509.Certificate) (out []byte) {
		for _, cert := range certs {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
		}
		return out
	}
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{"svid.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600},
		{"svid.pem", encode(svid.Chain), 0o644},
		{"bundle.pem", encode(roots), 0o644},
	} {
		if err := replace(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			return err
		}
	}
	return nil
}

// replace puts a new file in the place of one that may be there, whose mode and links do not count.
func replace(name string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Chmod(mode), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), name)
}

func (c *cli) identityToken() *cobra.Command {
	var audience []string
	var only string
	cmd := &cobra.Command{
		Use:   "token --audience NAME",
		Short: "Fetch a JWT-SVID of this very process for an audience",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, ctx, cancel, err := workloadAPI(cmd.Context())
			if err != nil {
				return err
			}
			defer cancel()
			defer func() { _ = client.Close() }()
			var id identity.ID
			if only != "" {
				if id, err = identity.ParseID(only); err != nil {
					return err
				}
			}
			svids, err := client.FetchJWT(ctx, audience, id)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(c.out, svids[0].Token)
			return err
		},
	}
	cmd.Flags().StringArrayVar(&audience, "audience", nil, "who the token is for; may be repeated (required)")
	cmd.Flags().StringVar(&only, "spiffe-id", "", "insist on this identity")
	_ = cmd.MarkFlagRequired("audience")
	return cmd
}
