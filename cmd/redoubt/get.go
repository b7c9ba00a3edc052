package main

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/api/client"
)

// lister lists one kind of thing: as values for JSON, and as a table.
type lister func(ctx context.Context, api *client.Client) (items any, header string, rows func(line func(...any)), err error)

// of makes a lister out of an iterator and a row function.
func of[T any](seq func(context.Context, *client.Client) func(func(T, error) bool), header string, row func(T) []any) lister {
	return func(ctx context.Context, api *client.Client) (any, string, func(func(...any)), error) {
		items, err := collect(seq(ctx, api))
		return items, header, func(line func(...any)) {
			for _, item := range items {
				line(row(item)...)
			}
		}, err
	}
}

func (c *cli) getVerb() *cobra.Command {
	kinds := c.listers()
	return &cobra.Command{
		Use:       "get KIND",
		Short:     "List what the server knows: " + strings.Join(slices.Sorted(maps.Keys(kinds)), ", "),
		Args:      cobra.ExactArgs(1),
		ValidArgs: slices.Sorted(maps.Keys(kinds)),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, ok := kinds[args[0]]
			if !ok {
				return usagef("redoubt get knows no %q; it knows %s", args[0], strings.Join(slices.Sorted(maps.Keys(kinds)), ", "))
			}
			return c.withAPI(func(api *client.Client) error {
				items, header, rows, err := list(cmd.Context(), api)
				if err != nil {
					return err
				}
				return c.show(items, func(w io.Writer) { table(w, header, rows) })
			})
		},
	}
}

// line prints one item of a stream: one line of JSON, or text.
func (c *cli) line(v any, text func(io.Writer)) error {
	if c.json {
		return json.NewEncoder(c.out).Encode(v)
	}
	text(c.out)
	return nil
}

func shorten(s string, n int) string {
	if len(s) > n {
		return s[:n-1] + "…"
	}
	return s
}

func selectorText(all bool, service, machine string, labels map[string]string) string {
	if all {
		return "all"
	}
	var parts []string
	if service != "" {
		parts = append(parts, "service="+service)
	}
	if machine != "" {
		parts = append(parts, "machine="+machine)
	}
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, "label."+k+"="+labels[k])
	}
	return strings.Join(parts, ",")
}
