package main

import "os"

// colour is an SGR parameter.
type colour string

const (
	bold   colour = "1"
	dim    colour = "2"
	red    colour = "31"
	green  colour = "32"
	yellow colour = "33"
	blue   colour = "34"
	violet colour = "35"
	cyan   colour = "36"
)

// paint colours text on a terminal only, and not where NO_COLOR is set.
func (c *cli) paint(how colour, text string) string {
	f, ok := c.out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return text
	}
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return text
	}
	return "\x1b[" + string(how) + "m" + text + "\x1b[0m"
}

func layerColour(layer string) colour {
	switch layer {
	case "runtime":
		return violet
	case "network":
		return blue
	case "api":
		return cyan
	default:
		return yellow
	}
}
