"""The tables of the journal. STRICT: a value of the wrong type is an error, not a surprise."""

from __future__ import annotations

SCHEMA_VERSION = 4
"""Written as ``user_version``. An older store is brought forward by :data:`MIGRATIONS`, a newer one is refused."""

APPLICATION_ID = 0x66736872
"""Marks the file as a fedshare journal (``fshr``)."""

_META = "INSERT INTO meta VALUES ('transactions', '0');"

_UPDATE_COLUMNS = """
  update_id TEXT PRIMARY KEY,
  ingest_seq INTEGER NOT NULL UNIQUE,
  entry_seq INTEGER NOT NULL UNIQUE REFERENCES entries (seq),
  member TEXT NOT NULL,
  organisation TEXT NOT NULL,
  task_id TEXT NOT NULL REFERENCES tasks (task_id),
  state TEXT NOT NULL CHECK (state IN ({states})),
  reason TEXT NOT NULL DEFAULT '',
  base_version INTEGER NOT NULL CHECK (base_version >= 0),
  version INTEGER NOT NULL DEFAULT 0 CHECK ((state = 'MERGED') = (version > 0)),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
  size INTEGER NOT NULL CHECK (size > 0),
  coefficients INTEGER NOT NULL,
  directions INTEGER NOT NULL,
  heads INTEGER NOT NULL,
  envelope INTEGER NOT NULL,
  lease_id TEXT NOT NULL,
  rows INTEGER NOT NULL,
  received_ms INTEGER NOT NULL,
  relative_error REAL NOT NULL DEFAULT 0,
  original_sha256 TEXT,
  original_size INTEGER NOT NULL DEFAULT 0"""

_STATES_2 = "'ACCEPTED', 'MERGED', 'REFUSED', 'QUARANTINED'"
_UPDATES_2 = f"CREATE TABLE updates ({_UPDATE_COLUMNS.format(states=_STATES_2)}\n) STRICT;\n"

_STATES = f"{_STATES_2}, 'FORGOTTEN'"
_UPDATES = f"""
CREATE TABLE updates ({_UPDATE_COLUMNS.format(states=_STATES)},
  signer TEXT NOT NULL DEFAULT '',
  sequence INTEGER NOT NULL DEFAULT 0,
  signature BLOB NOT NULL DEFAULT x'',
  privacy TEXT NOT NULL DEFAULT '',
  released INTEGER NOT NULL DEFAULT 0 CHECK (released IN (0, 1)),
  terms TEXT NOT NULL DEFAULT ''
) STRICT;
"""

_UPDATE_INDEXES_2 = """
CREATE INDEX updates_waiting ON updates (ingest_seq) WHERE state = 'ACCEPTED';
CREATE INDEX updates_of_task ON updates (task_id, version);
CREATE INDEX updates_of_version ON updates (version) WHERE version > 0;
"""

_UPDATE_INDEXES = f"""{_UPDATE_INDEXES_2}
CREATE UNIQUE INDEX updates_signed ON updates (signer, sequence) WHERE sequence > 0;
"""

_CERTIFICATES = """
CREATE TABLE certificates (
  key_sha256 TEXT NOT NULL CHECK (length(key_sha256) = 64),
  member TEXT NOT NULL,
  certificate BLOB NOT NULL,
  issued_ms INTEGER NOT NULL,
  PRIMARY KEY (key_sha256, issued_ms)
) STRICT;
"""

_PRIVACY = """
CREATE TABLE privacy (
  task_id TEXT PRIMARY KEY REFERENCES tasks (task_id),
  events TEXT NOT NULL,
  delta REAL NOT NULL,
  epsilon REAL NOT NULL
) STRICT;
"""

_VERSIONS = """
CREATE TABLE versions (
  version INTEGER PRIMARY KEY CHECK (version > 0),
  entry_seq INTEGER NOT NULL UNIQUE REFERENCES entries (seq),
  delta_sha256 TEXT NOT NULL,
  delta_size INTEGER NOT NULL,
  snapshot_sha256 TEXT,
  snapshot_size INTEGER NOT NULL DEFAULT 0,
  compacts INTEGER NOT NULL CHECK (compacts IN (0, 1)),
  sizes TEXT NOT NULL,
  policy TEXT NOT NULL,
  manifest BLOB NOT NULL,
  signature BLOB NOT NULL,
  collected INTEGER NOT NULL DEFAULT 0 CHECK (collected IN (0, 1)),
  committed_ms INTEGER NOT NULL
) STRICT;
"""

SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
{_META}

CREATE TABLE entries (
  seq INTEGER PRIMARY KEY,
  kind TEXT NOT NULL,
  body TEXT NOT NULL,
  previous BLOB NOT NULL CHECK (length(previous) = 32),
  hash BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;

CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL) STRICT;
INSERT INTO head VALUES (1, 0);
{_UPDATES}{_UPDATE_INDEXES}{_VERSIONS}
CREATE TABLE tasks (
  task_id TEXT PRIMARY KEY,
  owner TEXT NOT NULL,
  created_version INTEGER NOT NULL DEFAULT 0,
  updated_version INTEGER NOT NULL DEFAULT 0,
  updates INTEGER NOT NULL DEFAULT 0,
  ledger TEXT NOT NULL DEFAULT '',
  sharing TEXT NOT NULL DEFAULT '',
  schema_sha256 TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TABLE evaluations (
  task_id TEXT NOT NULL REFERENCES tasks (task_id),
  version INTEGER NOT NULL,
  metric TEXT NOT NULL,
  value REAL NOT NULL,
  rows INTEGER NOT NULL,
  PRIMARY KEY (task_id, version, metric)
) STRICT, WITHOUT ROWID;

CREATE TABLE members (
  member TEXT PRIMARY KEY,
  role TEXT NOT NULL,
  key_sha256 TEXT NOT NULL CHECK (length(key_sha256) = 64),
  certificate BLOB NOT NULL,
  enrolled_ms INTEGER NOT NULL,
  revoked INTEGER NOT NULL DEFAULT 0 CHECK (revoked IN (0, 1)),
  hosts TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TABLE nodes (
  member TEXT PRIMARY KEY REFERENCES members (member),
  public_key BLOB NOT NULL UNIQUE,
  node_id TEXT NOT NULL DEFAULT '0'
) STRICT;

CREATE TABLE used_tokens (
  nonce TEXT PRIMARY KEY,
  member TEXT NOT NULL,
  key_sha256 TEXT NOT NULL,
  used_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE traffic (
  member TEXT PRIMARY KEY,
  down_deltas INTEGER NOT NULL DEFAULT 0,
  down_snapshots INTEGER NOT NULL DEFAULT 0,
  down_heads INTEGER NOT NULL DEFAULT 0
) STRICT;
{_CERTIFICATES}{_PRIVACY}"""

MIGRATIONS = {
    1: f"""
{_META}
ALTER TABLE tasks ADD COLUMN sharing TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN schema_sha256 TEXT NOT NULL DEFAULT '';
ALTER TABLE updates RENAME TO updates_1;
ALTER TABLE versions RENAME TO versions_1;
DROP INDEX updates_waiting;
DROP INDEX updates_of_task;
{_UPDATES_2}{_VERSIONS}
INSERT INTO updates
  SELECT update_id, ingest_seq, entry_seq, member, organisation, task_id, state, reason, base_version, version, sha256,
    size, coefficients, directions, heads, envelope, lease_id, rows, received_ms, relative_error, NULL, 0
  FROM updates_1;
INSERT INTO versions
  SELECT version, entry_seq, delta_sha256, delta_size, snapshot_sha256, snapshot_size, compacts, sizes, '', x'', x'', 0,
    committed_ms
  FROM versions_1;
DROP TABLE versions_1;
DROP TABLE updates_1;
{_UPDATE_INDEXES_2}""",
    2: f"""
ALTER TABLE updates RENAME TO updates_2;
DROP INDEX updates_waiting;
DROP INDEX updates_of_task;
DROP INDEX updates_of_version;
{_UPDATES}
INSERT INTO updates SELECT *, '', 0, x'', '', 0, '' FROM updates_2;
DROP TABLE updates_2;
{_UPDATE_INDEXES}{_CERTIFICATES}{_PRIVACY}
ALTER TABLE members ADD COLUMN hosts TEXT NOT NULL DEFAULT '';
INSERT INTO certificates SELECT key_sha256, member, certificate, enrolled_ms FROM members;""",
    3: "ALTER TABLE traffic ADD COLUMN down_heads INTEGER NOT NULL DEFAULT 0;",
}
"""Statements that bring a store of each older format to the next one, run in one transaction."""
