package api

import (
	"net/url"

	"github.com/redoubtsec/redoubt/api/client"
)

// pageOutput is one page of every list.
type pageOutput[T any] struct {
	Link string `header:"Link" doc:"The next page, rel=\"next\" (RFC 8288)."`
	Body client.Page[T]
}

// pageOf makes the page of a list whose items were asked for with one more than the limit: the one too many says that
// there is a next page, and is not part of this one. position names an item's place for the cursor.
func pageOf[T any](c *call, list string, items []T, limit int, position func(T) string) *pageOutput[T] {
	out := &pageOutput[T]{Body: client.Page[T]{Items: items}}
	if len(items) > limit {
		out.Body.Items = items[:limit]
		out.Body.Next = encodeCursor(list, position(items[limit-1]))
		out.Link = nextLink(&url.URL{Path: c.op.path, RawQuery: url.Values(c.query).Encode()}, out.Body.Next)
	}
	if out.Body.Items == nil {
		out.Body.Items = []T{}
	}
	return out
}

// nothing is the input of operations that take none.
type nothing struct{}

// body is the output of operations that answer with one thing.
type body[T any] struct {
	Body T
}
