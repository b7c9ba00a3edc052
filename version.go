package redoubt

import (
	"runtime/debug"
	"sync"
)

// version is set by the command at start; tests and libraries have the module's own.
var version = sync.OnceValue(func() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "unversioned"
})

// Version is the version of this build, as servers and agents tell it.
func Version() string { return version() }

// SetVersion says what the linker was told; called once, before any role is made.
func SetVersion(v string) {
	if v != "" && v != "unversioned" {
		version = func() string { return v }
	}
}
