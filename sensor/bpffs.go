package sensor

import "github.com/redoubtsec/redoubt/refusal"

// Pin is one object on a bpffs.
type Pin struct {
	Path string `json:"path"`
	Kind string `json:"kind"` // map, program, link
	// Type is the kernel's name of the sort of map, program or link: "Hash", "CGroupSockAddr", "Cgroup".
	Type string `json:"type"`
	Name string `json:"name,omitempty"` // the kernel's name of a map or program
}

// ErrNotBPFFS is the code of the refusal of a directory that is not on a bpffs.
var ErrNotBPFFS = &refusal.Error{Code: "not-a-bpffs"}

func notBPFFS(what, dir, why string, err error) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrNotBPFFS.Code, What: what + " " + dir, Why: why,
		Do: "name a directory on a file system of type bpf", Err: err,
	}
}
