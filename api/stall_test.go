package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/identity"
)

// serveBound serves as a server would: HTTP/2 over TLS, within the bounds.
func serveBound(t *testing.T, h *apitest.House) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(h.Handler(t))
	srv.EnableHTTP2 = true
	api.Bound(srv.Config)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

// staller is an HTTP/2 client that asks and never lets the server send a byte of a body.
type staller struct {
	conn       net.Conn
	maxStreams uint32

	mu       sync.Mutex
	answered int // guarded by mu: streams whose header came
	reset    int // guarded by mu: streams that the server gave up
}

func stall(t *testing.T, address, path string, streams int) *staller {
	t.Helper()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	s := &staller{conn: conn}
	f := http2.NewFramer(conn, conn)
	_, err = io.WriteString(conn, http2.ClientPreface)
	err = errors.Join(err, f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	first, ferr := f.ReadFrame()
	if err = errors.Join(err, ferr); err != nil {
		t.Fatal(err)
	}
	if settings, ok := first.(*http2.SettingsFrame); ok {
		s.maxStreams, _ = settings.Value(http2.SettingMaxConcurrentStreams)
	}
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for i := range streams {
		block.Reset()
		for _, field := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", address}, {":path", path}} {
			_ = enc.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
		}
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
	}
	go func() {
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			s.mu.Lock()
			switch frame.(type) {
			case *http2.HeadersFrame:
				s.answered++
			case *http2.RSTStreamFrame:
				s.reset++
			}
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *staller) counts() (answered, reset int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered, s.reset
}

// TestStalledReadersDoNotLockTheOperatorOut: more answers than there are places, none of which is ever read.
func TestStalledReadersDoNotLockTheOperatorOut(t *testing.T) {
	h := apitest.New(t)
	srv := serveBound(t, h)
	address := srv.Listener.Addr().String()
	var stalled []*staller
	for i := range 6 {
		path := []string{"/v1/openapi.json", "/v1/bundle", "/v1/status"}[i%3] // a document, a public operation, a refusal
		stalled = append(stalled, stall(t, address, path, 60))
	}
	answered, reset := 0, 0
	count := func() {
		answered, reset = 0, 0
		for _, s := range stalled {
			a, r := s.counts()
			answered, reset = answered+a, reset+r
		}
	}
	eventually(t, func() bool { count(); return answered == 360 || h.Meter.Of("api_busy") > 0 })
	client := srv.Client()
	req, _ := http.NewRequestWithContext(t.Context(), "GET", srv.URL+"/v1/status", nil)
	req.Header.Set("Authorization", "Bearer "+h.Secret)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("the operator gets %d while others do not read", resp.StatusCode)
	}
	for end := time.Now().Add(9 * time.Second); time.Now().Before(end) && reset < 360; time.Sleep(20 * time.Millisecond) {
		count()
	}
	if reset != 360 {
		t.Errorf("%d of 360 answers that nobody reads were given up in time", reset)
	}
	if got := stalled[0].maxStreams; got != 64 {
		t.Errorf("one connection may have %d requests at once, want 64", got)
	}
}

// TestConnectionsOfOneAddressAreBounded also shows that a place is free again when its connection ends.
func TestConnectionsOfOneAddressAreBounded(t *testing.T) {
	srv := serveBound(t, apitest.New(t))
	dial := func() (net.Conn, bool) {
		conn, err := tls.Dial("tcp", srv.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return nil, false
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn, true
	}
	var open []net.Conn
	for range 64 {
		conn, ok := dial()
		if !ok {
			t.Fatalf("refused after %d", len(open))
		}
		open = append(open, conn)
	}
	if _, ok := dial(); ok {
		t.Error("a 65th connection is served")
	}
	_ = open[0].Close()
	eventually(t, func() bool { _, ok := dial(); return ok })
}

// heldBundle is an authority that is slow to tell its public keys.
type heldBundle struct {
	api.Authority
	entered, let chan struct{}
}

func (b heldBundle) Bundle() *identity.Bundle {
	b.entered <- struct{}{}
	<-b.let
	return b.Authority.Bundle()
}

func TestPublicWorkIsBoundedApart(t *testing.T) {
	h := apitest.New(t)
	held := heldBundle{h.Config.Authority, make(chan struct{}, 100), make(chan struct{})}
	h.Config.Authority = held
	handler := h.Handler(t)
	get := func(path, credential string) int {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(context.WithoutCancel(t.Context()), "GET", path, nil)
		if credential != "" {
			r.Header.Set("Authorization", "Bearer "+credential)
		}
		handler.ServeHTTP(w, r)
		return w.Code
	}
	done := make(chan int, 32)
	for range 32 {
		go func() { done <- get("/v1/bundle", "") }()
	}
	for range 32 {
		<-held.entered
	}
	got := fmt.Sprint(get("/v1/bundle", ""), get("/v1/status", h.Secret), get("/v1/openapi.json", ""), h.Meter.Of("api_busy"))
	if want := "503 200 200 1"; got != want {
		t.Errorf("the 33rd, the operator, the document, counted: %s, want %s", got, want)
	}
	close(held.let)
	for range 32 {
		if code := <-done; code != 200 {
			t.Errorf("one in work: %d", code)
		}
	}
}
