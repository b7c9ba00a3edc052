package client

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a time.Duration that is an ISO 8601 duration in JSON: PT5M, P1DT12H, PT0.5S.
//
// Shape: weeks, days, hours, minutes and seconds; a day is 24 hours. Years and months are refused, since their length
// depends on when they begin; so are negative durations. Zero value: PT0S. Source: ISO 8601-1:2019, 5.5.2; RFC 3339,
// appendix A.
type Duration time.Duration

var errDuration = errors.New("not an ISO 8601 duration of weeks, days, hours, minutes and seconds, such as PT5M or P1DT12H")

// String renders the canonical form, without zero parts.
func (d Duration) String() string {
	rest := max(time.Duration(d), 0)
	if rest == 0 {
		return "PT0S"
	}
	var b strings.Builder
	b.WriteByte('P')
	if days := rest / (24 * time.Hour); days > 0 {
		b.WriteString(strconv.FormatInt(int64(days), 10) + "D")
		rest -= days * 24 * time.Hour
	}
	if rest == 0 {
		return b.String()
	}
	b.WriteByte('T')
	if h := rest / time.Hour; h > 0 {
		b.WriteString(strconv.FormatInt(int64(h), 10) + "H")
		rest -= h * time.Hour
	}
	if m := rest / time.Minute; m > 0 {
		b.WriteString(strconv.FormatInt(int64(m), 10) + "M")
		rest -= m * time.Minute
	}
	if rest > 0 {
		text := strconv.FormatInt(int64(rest/time.Second), 10)
		if frac := rest % time.Second; frac > 0 {
			digits := strconv.FormatInt(int64(frac)+int64(time.Second), 10)[1:]
			text += "." + strings.TrimRight(digits, "0")
		}
		b.WriteString(text + "S")
	}
	return b.String()
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. Trust: b is attacker-controlled.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := ParseDuration(string(b))
	if err != nil {
		return err
	}
	*d = v
	return nil
}

// ParseDuration reads an ISO 8601 duration. Errors: anything else, and what does not fit a time.Duration; the text is
// not quoted. Trust: s is attacker-controlled.
func ParseDuration(s string) (Duration, error) {
	date, clock, hasClock := strings.Cut(strings.TrimPrefix(s, "P"), "T")
	if !strings.HasPrefix(s, "P") || len(s) > 64 || hasClock && clock == "" || !hasClock && date == "" {
		return 0, errDuration
	}
	var total time.Duration
	days := []unit{{'W', 7 * 24 * time.Hour}, {'D', 24 * time.Hour}}
	hours := []unit{{'H', time.Hour}, {'M', time.Minute}, {'S', time.Second}}
	if err := parts(date, days, &total); err != nil {
		return 0, err
	}
	if err := parts(clock, hours, &total); err != nil {
		return 0, err
	}
	return Duration(total), nil
}

type unit struct {
	letter byte
	length time.Duration
}

// parts adds the designators of s, each at most once and in the order of units.
func parts(s string, units []unit, total *time.Duration) error {
	for s != "" {
		end := strings.IndexFunc(s, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
		if end <= 0 {
			return errDuration
		}
		for len(units) > 0 && units[0].letter != s[end] {
			units = units[1:]
		}
		if len(units) == 0 {
			return errDuration
		}
		n, err := quantity(s[:end], units[0])
		if err != nil || n > math.MaxInt64-*total {
			return errDuration
		}
		*total += n
		s, units = s[end+1:], units[1:]
	}
	return nil
}

func quantity(digits string, u unit) (time.Duration, error) {
	whole, frac, fractional := strings.Cut(digits, ".")
	if fractional && (u.letter != 'S' || frac == "" || len(frac) > 9) {
		return 0, errDuration
	}
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || n > math.MaxInt64/int64(u.length) {
		return 0, errDuration
	}
	d := time.Duration(n) * u.length
	if fractional {
		f, err := strconv.ParseInt(frac+strings.Repeat("0", 9-len(frac)), 10, 64)
		if err != nil || time.Duration(f) > math.MaxInt64-d {
			return 0, errDuration
		}
		d += time.Duration(f)
	}
	return d, nil
}
