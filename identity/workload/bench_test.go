//go:build linux

package workload_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
)

func BenchmarkIdentify(b *testing.B) {
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s")})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	client, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	server, err := ln.AcceptUnix()
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	root := cgroupRoot(b)
	for _, m := range methods {
		b.Run(string(m), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c, err := workload.Identify(server, workload.Options{CgroupRoot: root, Method: m})
				if err != nil {
					b.Fatal(err)
				}
				_ = c.Close()
			}
		})
		b.Run(string(m)+"/verify", func(b *testing.B) {
			c, err := workload.Identify(server, workload.Options{CgroupRoot: root, Method: m})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			b.ReportAllocs()
			for b.Loop() {
				if err := c.Verify(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkFetchX509SVID is a call on a connection that is there: the first message of a stream.
func BenchmarkFetchX509SVID(b *testing.B) {
	src := newBoard(b)
	src.grant(ownCgroup(b), serviceID(b, "orders"))
	// Streams that were just given up still count for a moment: the bound on calls is not what is measured.
	client, _ := dialConn(b, serve(b, workload.Config{Source: src, MaxStreams: 1 << 20}).socket)
	b.ReportAllocs()
	for b.Loop() {
		ctx, cancel := context.WithCancel(withHeader(b.Context())) // a stream ends with its context
		stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			b.Fatal(err)
		}
		cancel()
	}
}
