-- +goose Up

-- How many events there are of each machine, so that trimming takes from those that have most. Kept by the triggers.
CREATE TABLE event_shares (
    machine   TEXT PRIMARY KEY,
    decisions INTEGER NOT NULL,
    others    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX event_shares_weight ON event_shares (decisions + others);
CREATE TABLE event_total (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    n   INTEGER NOT NULL
) STRICT;
INSERT INTO event_shares SELECT machine, sum(decision <> ''), sum(decision = '') FROM events GROUP BY machine;
INSERT INTO event_total SELECT 1, count(*) FROM events;
CREATE INDEX events_share ON events (machine, (decision <> ''), position);

-- +goose StatementBegin
CREATE TRIGGER events_added AFTER INSERT ON events BEGIN
    INSERT INTO event_shares VALUES (new.machine, new.decision <> '', new.decision = '')
        ON CONFLICT (machine) DO UPDATE SET decisions = decisions + excluded.decisions, others = others + excluded.others;
    UPDATE event_total SET n = n + 1;
END;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE TRIGGER events_removed AFTER DELETE ON events BEGIN
    UPDATE event_shares SET decisions = decisions - (old.decision <> ''), others = others - (old.decision = '') WHERE machine = old.machine;
    DELETE FROM event_shares WHERE machine = old.machine AND decisions + others = 0;
    UPDATE event_total SET n = n - 1;
END;
-- +goose StatementEnd
