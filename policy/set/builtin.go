package set

import (
	_ "embed"
	"strings"
	"sync"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
)

//go:embed builtin.cedar
var builtinText string

//go:embed unlock.cedar
var unlockText string

// The names of the built-in files, and the prefix that no file and no policy of a set may have.
const (
	builtinPrefix = "builtin/"
	builtinName   = builtinPrefix + "redoubt.cedar"
	unlockName    = builtinPrefix + "unlock.cedar"
)

// Names of entities that other rooms must use for the built-in policies to hold.
const (
	// OperatorsGroup is the Group of those who administer.
	OperatorsGroup = "operators"
	// LocalOperator is the User who holds the credential in the server's data directory. The un-lock rule is about this
	// user without an `issuer`; a login that somebody else vouches for must carry one.
	LocalOperator = "operator"
	// PolicySetSection is the Operation that is the parent of every operation on policy sets: apply, confirm, roll back,
	// read, compare.
	PolicySetSection = "policy-set"
)

// Builtin returns the built-in files, for reading. They are in front of every set and not among its [Set.Files].
func Builtin() []File {
	return []File{{Name: builtinName, Content: builtinText}, {Name: unlockName, Content: unlockText}}
}

// unlockEngine decides by unlock.cedar alone.
var unlockEngine = sync.OnceValues(func() (*eval.Engine, error) {
	return eval.Compile([]eval.File{{Name: unlockName, Text: []byte(unlockText)}})
})

func isBuiltin(name string) bool { return strings.HasPrefix(strings.ToLower(name), builtinPrefix) }

// The services of the never-touch list: what a machine needs to stay reachable and to be put right.
var neverTouch = []policy.UID{
	{Type: "Service", ID: "sshd"},
	{Type: "Service", ID: "dns"},
	{Type: "Service", ID: "dhcp"},
	{Type: "Service", ID: "ntp"},
	{Type: "Service", ID: "redoubt-agent"},
}

// NeverTouch returns the never-touch list. In Run and Net, what acts as one of these services on the machine that decides,
// and what is done to one of them, is permitted unless a forbid names the service in its scope by == or in.
func NeverTouch() []policy.UID { return append([]policy.UID(nil), neverTouch...) }
