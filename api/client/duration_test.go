package client_test

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
)

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"PT0S": 0, "PT5M": 5 * time.Minute, "PT1H30M": 90 * time.Minute, "P1D": 24 * time.Hour, "P1DT12H": 36 * time.Hour, "PT0.5S": 500 * time.Millisecond,
		"PT1.000000001S": time.Second + 1, "PT36H": 36 * time.Hour, "P2W": 14 * 24 * time.Hour, "P1W1D": 8 * 24 * time.Hour, "PT90M": 90 * time.Minute,
	} {
		got, err := client.ParseDuration(text)
		if err != nil || time.Duration(got) != want {
			t.Errorf("%s: %v %v", text, time.Duration(got), err)
		}
		if again, err := client.ParseDuration(got.String()); err != nil || again != got {
			t.Errorf("%s: rendered as %s, read as %v %v", text, got, time.Duration(again), err)
		}
	}
	for _, bad := range []string{
		"", "P", "PT", "P1", "PT1", "5m", "P1Y", "P1M", "PT1M1H", "PT1M1M", "P1DT", "PT1.5H", "PT.5S", "PT1.S", "-PT1S", "PT-1S", "pt1s", "P1H", "PT1D",
		"PT1.0000000001S", "PT99999999999999999999S", "P106752D", "P106751DT24H", " PT1S", "PT1S ", "P" + strings.Repeat("1", 70) + "D",
	} {
		if got, err := client.ParseDuration(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, time.Duration(got))
		} else if len(bad) > 8 && strings.Contains(err.Error(), bad) {
			t.Errorf("%q is repeated in %v", bad, err)
		}
	}
	for d, want := range map[client.Duration]string{
		client.Duration(5 * time.Minute): `"PT5M"`, client.Duration(25 * time.Hour): `"P1DT1H"`, client.Duration(1500 * time.Millisecond): `"PT1.5S"`,
		-1: `"PT0S"`, math.MaxInt64: `"P106751DT23H47M16.854775807S"`,
	} {
		if got, err := json.Marshal(d); err != nil || string(got) != want {
			t.Errorf("%d: %s %v, want %s", d, got, err, want)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"PT5M", "P1DT12H", "P2W", "PT0.000000001S", "P106751DT23H47M16.854775807S", "PT1.5H", "P", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := client.ParseDuration(s)
		if err != nil {
			return
		}
		if d < 0 {
			t.Fatalf("%q is negative", s)
		}
		if again, err := client.ParseDuration(d.String()); err != nil || again != d {
			t.Fatalf("%q: %s: %v %v", s, d, again, err)
		}
	})
}
