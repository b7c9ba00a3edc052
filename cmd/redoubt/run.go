package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sandbox"
)

// workloadFlags are what run and enroll say of a workload.
type workloadFlags struct {
	service string
	labels  []string
	listen  []string
}

func (f *workloadFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.service, "service", "", "service that the workload is an instance of (required)")
	cmd.Flags().StringArrayVar(&f.labels, "label", nil, "label KEY=VALUE; may be repeated")
	cmd.Flags().StringArrayVar(&f.listen, "listen", nil, "port it serves, PORT/http or PORT/tcp; may be repeated")
	_ = cmd.MarkFlagRequired("service")
}

func (f *workloadFlags) parse() (map[string]string, []fleet.Listen, error) {
	labels := map[string]string{}
	for _, l := range f.labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return nil, nil, usagef("--label %q is not KEY=VALUE", l)
		}
		labels[k] = v
	}
	var listen []fleet.Listen
	for _, l := range f.listen {
		port, protocol, _ := strings.Cut(l, "/")
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || protocol == "" {
			return nil, nil, usagef("--listen %q is not PORT/http or PORT/tcp", l)
		}
		listen = append(listen, fleet.Listen{Port: uint16(n), Protocol: protocol})
	}
	return labels, listen, nil
}

func (c *cli) runVerb() *cobra.Command {
	var w workloadFlags
	var user, dir string
	var env []string
	var privileged bool
	cmd := &cobra.Command{
		Use:   "run --service NAME [flags] -- PROGRAM [ARG…]",
		Short: "Start a program as a workload with an identity, in a cgroup of its own, without privileges",
		Long: "Starts a program in a cgroup of its own, as an unprivileged user that nothing else runs as, with no capabilities,\n" +
			"no way to gain any, cgroupfs read-only, and io_uring, packet and vsock sockets refused. The program finds its\n" +
			"identity at SPIFFE_ENDPOINT_SOCKET. Standard streams and signals pass through; the exit status is the program's.",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			labels, listen, err := w.parse()
			if err != nil {
				return err
			}
			agent := c.agent()
			defer agent.Close()
			prepared, err := agent.Prepare(cmd.Context(), local.Prepare{
				Service: w.service, Labels: labels, Listen: listen, User: user, Privileged: privileged,
			})
			if err != nil {
				return err
			}
			return c.start(cmd.Context(), agent, prepared, args, dir, env)
		},
	}
	w.register(cmd)
	cmd.Flags().StringVar(&user, "user", "", "user to run as, by name or number (default: a dynamic one)")
	cmd.Flags().StringArrayVar(&env, "env", nil, "pass the variable NAME on, or set NAME=VALUE; may be repeated (only PATH, locale, terminal and time zone are passed unasked)")
	cmd.Flags().StringVar(&dir, "dir", "", "working directory (default: the present one if the user may enter it, else /)")
	cmd.Flags().BoolVar(&privileged, "privileged", false, "keep capabilities and allow uid 0; the workload is then not enforceable")
	return cmd
}

// start runs the program in the room that the agent prepared and waits for its end.
func (c *cli) start(ctx context.Context, agent *local.Client, p local.Prepared, argv []string, dir string, env []string) error {
	instance := p.Workload.Instance
	defer func() {
		// The agent would notice by itself within a second; this is faster, and its failure changes nothing.
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = agent.Ended(bye, instance)
	}()
	root, err := attest.CgroupRoot()
	if err != nil {
		return err
	}
	// Signals are the program's from here on: what comes to us is passed to it.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	proc, err := sandbox.Start(ctx, sandbox.Spec{
		Argv: argv, Env: environment(p, env), Dir: workingDir(dir, p.Workload.UID), Cgroup: filepath.Join(root, p.Workload.Cgroup),
		UID: p.Workload.UID, GID: p.Workload.GID, Privileged: p.Workload.Privileged,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	})
	if err != nil {
		_ = c.report(err)
		return exitStatus(sandbox.ExitStatus(err))
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case s := <-signals:
				_ = proc.Signal(s)
			case <-done:
				return
			}
		}
	}()
	// An interrupt is the program's, not this call's.
	telling, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	w, err := agent.Started(telling, instance, proc.PID())
	cancel()
	switch {
	case err != nil && !ended(err):
		_, _ = fmt.Fprintln(c.err, "redoubt: the program runs without an identity: "+err.Error())
	case err == nil:
		c.announce(w)
	}
	exit, err := proc.Wait()
	if err != nil {
		return err
	}
	if status := exit.Status(); status != 0 {
		return exitStatus(status)
	}
	return nil
}

// ended reports whether a process could not be attested because it is over already: a short program is no failure.
func ended(err error) bool {
	r := refusal.As(err)
	return r != nil && r.Code == "process-gone"
}

func (c *cli) announce(w machine.Workload) {
	switch {
	case w.Privileged:
		_, _ = fmt.Fprintf(c.err, "redoubt: %s is not enforceable: privileged workload\n", w.Instance)
	case w.Refusal != "":
		_, _ = fmt.Fprintf(c.err, "redoubt: %s runs without an identity: %s\n", w.Instance, w.Refusal)
	}
}

// passed are the variables that a workload gets of the operator's: what programs need to run at all. The rest may be
// secrets (cloud credentials, tokens) and is given by name, with --env.
var passed = []string{"PATH", "LANG", "LANGUAGE", "TERM", "TZ", "COLORTERM", "NO_COLOR"}

// environment is what a workload gets: the variables passed, those asked for, and the Workload API's address.
func environment(p local.Prepared, asked []string) []string {
	env := []string{"HOME=/", "SHELL=/bin/sh"}
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if slices.Contains(passed, name) || strings.HasPrefix(name, "LC_") {
			env = append(env, kv)
		}
	}
	for _, a := range asked {
		if !strings.Contains(a, "=") {
			value, ok := os.LookupEnv(a)
			if !ok {
				continue
			}
			a += "=" + value
		}
		env = append(env, a)
	}
	return append(env, "SPIFFE_ENDPOINT_SOCKET="+p.Socket, "REDOUBT_WORKLOAD="+p.Workload.Instance)
}

func workingDir(dir string, uid uint32) string {
	if dir != "" {
		return dir
	}
	here, err := os.Getwd()
	if err != nil {
		return "/"
	}
	// A dynamic user may not be allowed into the operator's home: then the root is the honest default.
	for p := here; ; p = filepath.Dir(p) {
		info, err := os.Stat(p)
		if err != nil || uid != 0 && info.Mode().Perm()&0o001 == 0 {
			return "/"
		}
		if p == "/" {
			return here
		}
	}
}

// forwarded are the signals that are passed to the program.
var forwarded = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH,
}

func (c *cli) enrollVerb() *cobra.Command {
	var w workloadFlags
	var stay bool
	cmd := &cobra.Command{
		Use:   "enroll UNIT|PID|CGROUP --service NAME",
		Short: "Adopt what is already running, without restarting it",
		Long: "Gives what already runs (a systemd unit, a process and its descendants, a cgroup) an identity. Nothing is restarted.\n" +
			"A process whose cgroup holds other programs too is moved, running, into a cgroup of its own.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			labels, listen, err := w.parse()
			if err != nil {
				return err
			}
			agent := c.agent()
			defer agent.Close()
			got, err := agent.Enroll(cmd.Context(), local.Enroll{
				Name: args[0], Service: w.service, Labels: labels, Listen: listen, Stay: stay,
			})
			if err != nil {
				return err
			}
			return c.show(got, func(out io.Writer) {
				_, _ = fmt.Fprintf(out, "enrolled %s as %s\n", got.Cgroup, got.Instance)
				if got.Moved > 0 {
					_, _ = fmt.Fprintf(out, "moved %d running processes into a cgroup of their own\n", got.Moved)
				}
				switch {
				case got.Refusal != "":
					_, _ = fmt.Fprintf(out, "no identity: %s\n", got.Refusal)
				case got.ID.IsZero():
					_, _ = fmt.Fprintln(out, "no identity yet: the server has not answered")
				default:
					_, _ = fmt.Fprintf(out, "identity %s\n", got.ID)
				}
				if got.Privileged {
					_, _ = fmt.Fprintln(out, "not enforceable: privileged workload")
				}
			})
		},
	}
	w.register(cmd)
	cmd.Flags().BoolVar(&stay, "stay", false, "refuse rather than move processes into a cgroup of their own")
	return cmd
}

func (c *cli) workloadVerb() *cobra.Command {
	cmd := &cobra.Command{Use: "workload", Short: "Act on a workload of this machine"}
	cmd.AddCommand(&cobra.Command{
		Use:   "forget INSTANCE",
		Short: "End the identity of a workload; its processes go on",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			agent := c.agent()
			defer agent.Close()
			return agent.Forget(cmd.Context(), args[0])
		},
	})
	return cmd
}
