// Package house holds the tests that keep the house as docs/ARCHITECTURE.md draws it: floors, heavy dependencies, package
// docs, and words that are not to be used as room names. It reads source files; a build cache cannot make it pass.
package house
