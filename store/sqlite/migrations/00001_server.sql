-- +goose Up

-- Audit leaves: written with the change they record, drained by the sequencer. The leaf is dropped once it is logged;
-- id and index stay, to tell what is in the log from what is not.
CREATE TABLE outbox (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,
    record_id TEXT NOT NULL UNIQUE,
    leaf      BLOB,
    idx       INTEGER UNIQUE,
    CHECK ((leaf IS NULL) = (idx IS NOT NULL))
) STRICT;
CREATE INDEX outbox_pending ON outbox (seq) WHERE idx IS NULL;

-- Keys of the authority; sealed is ciphertext.
CREATE TABLE ca_keys (
    id          TEXT PRIMARY KEY,
    use         TEXT NOT NULL,
    state       TEXT NOT NULL,
    created     INTEGER NOT NULL,
    not_before  INTEGER NOT NULL,
    not_after   INTEGER NOT NULL,
    certificate BLOB NOT NULL,
    sealed      BLOB
) STRICT, WITHOUT ROWID;

-- Editions of the policy set. head is the edition without its files.
CREATE TABLE editions (
    version INTEGER PRIMARY KEY,
    head    TEXT NOT NULL,
    files   TEXT NOT NULL
) STRICT;

CREATE TABLE overrides (
    id   TEXT PRIMARY KEY,
    body TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- The fleet. A body is the JSON of the thing; columns beside it are what is searched. Times are nanoseconds since 1970.
CREATE TABLE tokens (
    id      TEXT PRIMARY KEY,
    hash    BLOB NOT NULL,
    expires INTEGER NOT NULL,
    used    INTEGER,
    body    TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE machines (
    id   TEXT PRIMARY KEY,
    body TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE workloads (
    instance TEXT PRIMARY KEY,
    machine  TEXT NOT NULL,
    service  TEXT NOT NULL,
    identity TEXT NOT NULL,
    state    TEXT NOT NULL,
    seen     INTEGER NOT NULL,
    body     TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX workloads_machine ON workloads (machine, instance);
CREATE INDEX workloads_service ON workloads (service, instance);
CREATE INDEX workloads_identity ON workloads (identity, instance);
CREATE INDEX workloads_gone ON workloads (seen) WHERE state = 'gone';

CREATE TABLE revocations (
    id   TEXT PRIMARY KEY,
    body TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE quarantines (
    id   TEXT PRIMARY KEY,
    body TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- The change log: every change above the floor, and the last one of every key (live).
CREATE TABLE changes (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    kind     TEXT NOT NULL,
    key      TEXT NOT NULL,
    payload  BLOB,
    deleted  INTEGER NOT NULL
) STRICT;
CREATE TABLE live (
    kind     TEXT NOT NULL,
    key      TEXT NOT NULL,
    revision INTEGER NOT NULL UNIQUE,
    deleted  INTEGER NOT NULL,
    PRIMARY KEY (kind, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE change_bounds (
    one    INTEGER PRIMARY KEY CHECK (one = 1),
    floor  INTEGER NOT NULL,
    latest INTEGER NOT NULL
) STRICT;
INSERT INTO change_bounds VALUES (1, 0, 0);

-- Events and decisions, bounded by Trim.
CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    machine  TEXT NOT NULL,
    seq      INTEGER NOT NULL,
    time     INTEGER NOT NULL,
    layer    TEXT NOT NULL,
    kind     TEXT NOT NULL,
    workload TEXT NOT NULL,
    identity TEXT NOT NULL,
    decision TEXT NOT NULL,
    verdict  TEXT NOT NULL,
    body     TEXT NOT NULL
) STRICT;
CREATE INDEX events_machine ON events (machine, position);
CREATE INDEX events_kind ON events (kind, position);
CREATE INDEX events_workload ON events (workload, position) WHERE workload <> '';
CREATE INDEX events_identity ON events (identity, position) WHERE identity <> '';
CREATE INDEX events_decision ON events (decision) WHERE decision <> '';

CREATE TABLE event_streams (
    machine TEXT PRIMARY KEY,
    stream  TEXT NOT NULL,
    last    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
