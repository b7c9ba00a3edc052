package api_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/api/apitest"
)

func TestSmoke(t *testing.T) {
	h := apitest.New(t)
	srv := httptest.NewServer(h.Handler(t))
	defer srv.Close()
	for _, p := range []string{"GET /v1/status", "GET /v1/bundle", "GET /v1/openapi.json", "GET /v1/openapi.yaml", "GET /v1/policy-set", "GET /v1/policy-sets", "GET /v1/machines", "GET /v1/nope", "DELETE /v1/machines", "GET /v1/events?limit=0", "GET /v1/authority", "POST /v1/join-tokens"} {
		m, path, _ := strings.Cut(p, " ")
		req, _ := http.NewRequest(m, srv.URL+path, nil)
		req.Header.Set("Authorization", "Bearer "+h.Secret)
		if m == "POST" {
			req.Body = io.NopCloser(strings.NewReader(`{"machine":"m1","expires_in":"PT5M"}`))
			req.Header.Set("Content-Type", "application/json")
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		fmt.Println(p, resp.StatusCode, resp.Header)
		if len(b) < 3000 {
			fmt.Println(string(b))
		}
		if path == "/v1/openapi.json" {
			var doc struct {
				Components struct {
					Schemas map[string]struct {
						Properties map[string]struct{ Description string }
					}
				}
			}
			fmt.Println(json.Unmarshal(b, &doc))
			for n, s := range doc.Components.Schemas {
				for p, x := range s.Properties {
					if x.Description == "" {
						fmt.Println("undescribed", n+"."+p)
					}
				}
			}
		}
	}
	fmt.Println(h.Log.String())
}
