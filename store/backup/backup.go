package backup

import "context"

// Database can copy itself consistently while it is in use; *sqlite.Store does.
type Database interface {
	// Snapshot writes a consistent copy to a new file, 0600. Durability: none; the copy is read at once.
	Snapshot(ctx context.Context, path string) error
}
