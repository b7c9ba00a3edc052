package backup

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of an archive.
const (
	// MinPassphrase is the least length of a passphrase, in bytes: an archive may be attacked off line for years.
	MinPassphrase = 12
	// MaxFiles bounds the files of an archive: about 500 million audit leaves.
	MaxFiles = 2 << 20
	// MaxDatabase bounds the database, MaxFile any other file, MaxTotal all of them.
	MaxDatabase = 64 << 30
	MaxFile     = 32 << 20
	MaxTotal    = 256 << 30

	maxManifest   = 512 << 20
	maxName       = 240
	maxWorkFactor = 19 // of scrypt, 512 MiB: a hostile header could ask for hours; age's own default is 18
)

const (
	manifestName = "manifest.json"
	formatName   = "redoubt-backup"
	version      = 1
)

// Manifest says what an archive holds; it is its last file.
type Manifest struct {
	Format   string    `json:"format"`
	Version  int       `json:"version"`
	Created  time.Time `json:"created"`
	Database string    `json:"database"` // its name among Files
	Audit    string    `json:"audit"`    // the directory of the audit log among Files
	Leaves   uint64    `json:"leaves"`   // of the audit log
	Files    []Entry   `json:"files"`
}

// Entry is one file of an archive, named relative to the data directory that it is restored to.
type Entry struct {
	Name   string      `json:"name"` // slash-separated
	Size   int64       `json:"size"`
	Mode   fs.FileMode `json:"mode"`   // 0600 or 0644
	SHA256 string      `json:"sha256"` // 64 hex digits
}

// The codes of this room's refusals, to be matched with errors.Is.
var (
	ErrPassphrase = &refusal.Error{Code: "backup-passphrase"} // too short, or not the one of the archive
	ErrSource     = &refusal.Error{Code: "backup-source"}     // something to back up is missing or of a wrong kind
	ErrNotEmpty   = &refusal.Error{Code: "restore-not-empty"} // the directory has files
	ErrDamaged    = &refusal.Error{Code: "backup-damaged"}    // cut short, altered, or no back-up at all
	ErrHostile    = &refusal.Error{Code: "backup-hostile"}    // a name, type or size that no back-up of ours has
	ErrNewer      = &refusal.Error{Code: "backup-newer"}      // made by a later Redoubt
	ErrAudit      = &refusal.Error{Code: "backup-audit"}      // the audit log in it does not verify
	ErrDiskFull   = &refusal.Error{Code: "disk-full"}
)

func damaged(why string, err error) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrDamaged.Code, What: "restore", Why: why, Do: "use another back-up; nothing was restored", Err: err,
	}
}

func hostile(why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrHostile.Code, What: "restore", Why: "the archive has " + why,
		Do: "do not use it: Redoubt made no such archive; nothing was restored",
	}
}

// checkName refuses every name that is not plainly below the directory. Trust: name is attacker-controlled.
func checkName(name string) error {
	if name == "" || len(name) > maxName || path.Clean(name) != name || !fs.ValidPath(name) || name == "." {
		return hostile("a file name that is empty, too long, or leads elsewhere")
	}
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && strings.IndexByte("._-/", c) < 0 {
			return hostile("a file name with characters other than letters, digits, dots, hyphens and underscores")
		}
	}
	if first, _, _ := strings.Cut(name, "/"); first == staging {
		return hostile("a file name that is reserved")
	}
	return nil
}

func parseManifest(raw []byte) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, damaged("its manifest cannot be read", err)
	}
	switch {
	case m.Format != formatName || m.Version < 1:
		return m, damaged("its manifest is not one of a back-up", errors.New(m.Format))
	case m.Version > version:
		return m, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrNewer.Code, What: "restore", Why: fmt.Sprintf("the archive is of version %d, this Redoubt knows %d", m.Version, version),
			Do: "restore it with the Redoubt that made it, or a later one",
		}
	case len(m.Files) > MaxFiles:
		return m, hostile("too many files")
	}
	for _, e := range m.Files {
		if err := checkName(e.Name); err != nil {
			return m, err
		}
		if e.Mode != 0o600 && e.Mode != 0o644 {
			return m, hostile("a file mode other than 0600 and 0644")
		}
	}
	for _, name := range []string{m.Database, m.Audit} {
		if err := checkName(name); err != nil {
			return m, err
		}
	}
	return m, nil
}
