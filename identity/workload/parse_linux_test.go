package workload

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/refusal"
)

func FuzzParseCgroup(f *testing.F) {
	for _, s := range []string{
		"0::/\n", "0::/system.slice/a.service\n", "12:pids:/x\n1:name=systemd:/y\n0::/redoubt/w-1\n", "0::/a (deleted)\n",
		"0::/../b\n", "0::/..", "1:cpu:/a\n", "", "0::", "0::/a/../b\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		path, err := parseCgroup(b)
		if err != nil {
			if refusal.As(err) == nil {
				t.Fatalf("not a refusal: %v", err)
			}
			return
		}
		if !strings.HasPrefix(path, "/") || path == "/.." || strings.HasPrefix(path, "/../") || strings.Contains(path, "\n") {
			t.Fatalf("accepted %q", path)
		}
	})
}

func TestParseCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"0::/\n": "/", "9:name=systemd:/\n0::/redoubt/w-1\n": "/redoubt/w-1", "0::/a b:c\n": "/a b:c",
		"0::/gone (deleted)\n": "", "0::/../outside\n": "", "0::/..\n": "", "4:memory:/x\n": "", "0::\n": "",
	} {
		got, err := parseCgroup([]byte(text))
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", text, got, err, want)
		}
	}
}

func FuzzParseStart(f *testing.F) {
	rest := " S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 424242 1 2"
	for _, s := range []string{"1 (init)" + rest, "2 (a) b (c" + rest, "3 ()) 9 9 9)" + rest, "", "1 (x) S", ")"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStart(b) })
}

// A process chooses its name: one like ") S 1 1 …" must not choose its start time.
func TestTheNameOfAProcessCannotForgeItsStart(t *testing.T) {
	rest := " S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 424242 1 2"
	for _, name := range []string{"init", "a b", ") S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 7", "))((", "a\nb"} {
		if got, err := parseStart([]byte("77 (" + name + ")" + rest)); err != nil || got != 424242 {
			t.Errorf("%q: got %d, %v", name, got, err)
		}
	}
}

func FuzzClaimedSubject(f *testing.F) {
	body := base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"spiffe://example.test/a"}`))
	for _, s := range []string{"a." + body + ".c", "a.b.c", "", "..", body, "a." + body, "a.bnVsbA.c", "a.W10.c", strings.Repeat("x", 17<<10)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, token string) {
		id, err := claimedSubject(token)
		if err == nil && id.IsZero() {
			t.Fatal("no subject and no error")
		}
		if err != nil && len(token) > 40 && strings.Contains(err.Error(), token) {
			t.Fatal("the error quotes the token")
		}
	})
}
