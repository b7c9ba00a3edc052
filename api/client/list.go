package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
)

// list gets one page.
func list[T any](ctx context.Context, c *Client, path string, filter any, p Paging) (Page[T], error) {
	query := url.Values{}
	encode(query, p)
	if filter != nil {
		encode(query, filter)
	}
	var out Page[T]
	_, err := c.do(ctx, exchange{method: http.MethodGet, path: path, query: query, out: &out})
	return out, err
}

// all iterates over every page. It ends after the first error, which it yields.
func all[T any](ctx context.Context, get func(Paging) (Page[T], error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		p := Paging{Limit: 500}
		for {
			page, err := get(p)
			if err != nil {
				var zero T
				yield(zero, err)
				return
			}
			for _, item := range page.Items {
				if !yield(item, nil) {
					return
				}
			}
			if page.Next == "" || ctx.Err() != nil {
				return
			}
			p.Cursor = page.Next
		}
	}
}

// get gets one thing.
func get[T any](ctx context.Context, c *Client, path string, query url.Values) (T, error) {
	var out T
	_, err := c.do(ctx, exchange{method: http.MethodGet, path: path, query: query, out: &out})
	return out, err
}

// post posts, and returns the answer.
func post[T any](ctx context.Context, c *Client, path string, in any, creates bool) (T, error) {
	var out T
	_, err := c.do(ctx, exchange{method: http.MethodPost, path: path, in: in, out: &out, creates: creates})
	return out, err
}

func (c *Client) remove(ctx context.Context, path string) error {
	_, err := c.do(ctx, exchange{method: http.MethodDelete, path: path})
	return err
}
