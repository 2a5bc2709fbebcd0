CREATE TABLE docket_cache (
    cache_key BYTEA NOT NULL,
    execution_id TEXT,
    graph TEXT NOT NULL,
    step_name TEXT NOT NULL,
    step_version TEXT NOT NULL,
    item TEXT NOT NULL,
    item_index BIGINT,
    input_hash TEXT NOT NULL,
    output_type TEXT NOT NULL,
    output_data BYTEA NOT NULL,
    output_json JSONB,
    checksum BYTEA NOT NULL,
    ttl DOUBLE PRECISION,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    claimed_at TIMESTAMP WITH TIME ZONE,
    output_shape TEXT,
    CONSTRAINT pk_docket_cache PRIMARY KEY (cache_key),
    CONSTRAINT ck_docket_cache_cache_key CHECK (length(cache_key) = 32),
    CONSTRAINT ck_docket_cache_checksum CHECK (length(checksum) = 32)
);

CREATE INDEX ix_docket_cache_run ON docket_cache (execution_id, graph, step_name, item_index) WHERE execution_id IS NOT NULL;

CREATE INDEX ix_docket_cache_expired ON docket_cache (expires_at) WHERE expires_at IS NOT NULL;

COMMENT ON COLUMN docket_cache.execution_id IS 'NULL: shared by all runs (GLOBAL)';

COMMENT ON COLUMN docket_cache.item IS 'path of the item in a batch: '''', ''7'', ''7/3''';

COMMENT ON COLUMN docket_cache.input_hash IS 'SHA-256 in hex over the step''s inputs';

COMMENT ON COLUMN docket_cache.output_type IS 'full Protocol Buffers name';

COMMENT ON COLUMN docket_cache.output_json IS 'best-effort view of output_data';

COMMENT ON COLUMN docket_cache.ttl IS 'in seconds; WORKFLOW: counted from the end of the run';

COMMENT ON COLUMN docket_cache.claimed_at IS 'GLOBAL: when the step that made it began';

COMMENT ON COLUMN docket_cache.output_shape IS 'fields of output_type when output_data was written';

CREATE TABLE docket_executions (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    graph TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    step_name TEXT NOT NULL,
    item TEXT NOT NULL,
    delivery BIGINT NOT NULL,
    attempts INTEGER NOT NULL,
    cached BOOLEAN NOT NULL,
    status TEXT NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    duration_ms DOUBLE PRECISION NOT NULL,
    error_code TEXT,
    error_message TEXT,
    worker TEXT NOT NULL,
    task_id TEXT,
    CONSTRAINT pk_docket_executions PRIMARY KEY (id)
);

CREATE INDEX ix_docket_executions_run ON docket_executions (execution_id, graph);

CREATE INDEX ix_docket_executions_step ON docket_executions (step_name, started_at);

COMMENT ON COLUMN docket_executions.delivery IS 'counted from 1';

COMMENT ON COLUMN docket_executions.attempts IS 'calls made; 0: restored';

CREATE TABLE docket_runs (
    graph TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    task_name TEXT,
    task_id TEXT,
    retries INTEGER NOT NULL,
    target TEXT NOT NULL,
    job BYTEA NOT NULL,
    job_digest BYTEA NOT NULL,
    state TEXT NOT NULL,
    stage INTEGER NOT NULL,
    epoch BIGINT NOT NULL,
    owner TEXT,
    lease_until TIMESTAMP WITH TIME ZONE,
    lost INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    wake_at TIMESTAMP WITH TIME ZONE,
    progress JSONB,
    error JSONB,
    result BYTEA,
    result_checksum BYTEA,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE,
    ended_at TIMESTAMP WITH TIME ZONE,
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    items_failed BIGINT,
    items_allowed BIGINT,
    message BYTEA,
    lanes JSONB,
    CONSTRAINT pk_docket_runs PRIMARY KEY (execution_id, graph),
    CONSTRAINT ck_docket_runs_state CHECK (state IN ('QUEUED', 'RUNNING', 'WAITING', 'SUCCEEDED', 'FAILED', 'CANCELLED', 'QUARANTINED')),
    CONSTRAINT ck_docket_runs_execution_id CHECK (length(execution_id) BETWEEN 1 AND 255),
    CONSTRAINT ck_docket_runs_job_digest CHECK (length(job_digest) = 32),
    CONSTRAINT ck_docket_runs_result_checksum CHECK (length(result_checksum) = 32)
);

CREATE INDEX ix_docket_runs_failed ON docket_runs (ended_at) WHERE state IN ('FAILED', 'QUARANTINED');

CREATE INDEX ix_docket_runs_expired ON docket_runs (expires_at) WHERE expires_at IS NOT NULL;

CREATE INDEX ix_docket_runs_live ON docket_runs (created_at) WHERE ended_at IS NULL;

CREATE INDEX ix_docket_runs_due ON docket_runs (wake_at) WHERE message IS NOT NULL AND (wake_at IS NOT NULL OR state = 'RUNNING');

COMMENT ON COLUMN docket_runs.target IS 'full Protocol Buffers name of the result';

COMMENT ON COLUMN docket_runs.epoch IS 'fencing token; grows with each delivery';

COMMENT ON COLUMN docket_runs.owner IS 'of the lease, or of the last one';

COMMENT ON COLUMN docket_runs.lease_until IS 'until then no other delivery takes the run, if not NULL';

COMMENT ON COLUMN docket_runs.lost IS 'takeovers of leases that were never released';

COMMENT ON COLUMN docket_runs.failures IS 'ordinary Celery retries';

COMMENT ON COLUMN docket_runs.wake_at IS 'when a WAITING run''s next delivery is due';

COMMENT ON COLUMN docket_runs.expires_at IS 'when purging may delete the run';

COMMENT ON COLUMN docket_runs.items_failed IS 'of the open stage';

COMMENT ON COLUMN docket_runs.items_allowed IS 'how many may fail; -1: nothing of it starts any more';

COMMENT ON COLUMN docket_runs.message IS 'what is sent to continue the run if it is lost';

COMMENT ON COLUMN docket_runs.lanes IS 'of the open stage: most items at once, number of lanes';

CREATE TABLE docket_claims (
    cache_key BYTEA NOT NULL,
    owner TEXT NOT NULL,
    lease_until TIMESTAMP WITH TIME ZONE NOT NULL,
    claimed_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_docket_claims PRIMARY KEY (cache_key),
    CONSTRAINT ck_docket_claims_cache_key CHECK (length(cache_key) = 32)
);

CREATE INDEX ix_docket_claims_lease ON docket_claims (lease_until);

CREATE TABLE docket_chunks (
    graph TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    stage INTEGER NOT NULL,
    lo BIGINT NOT NULL,
    hi BIGINT NOT NULL,
    state TEXT NOT NULL,
    owner TEXT,
    epoch BIGINT NOT NULL,
    lease_until TIMESTAMP WITH TIME ZONE,
    task_id TEXT,
    retries INTEGER NOT NULL,
    lost INTEGER NOT NULL,
    failed BIGINT NOT NULL,
    errors JSONB,
    CONSTRAINT pk_docket_chunks PRIMARY KEY (graph, execution_id, stage, lo),
    CONSTRAINT ck_docket_chunks_state CHECK (state IN ('QUEUED', 'RUNNING', 'WAITING', 'SUCCEEDED', 'FAILED', 'CANCELLED', 'QUARANTINED')),
    CONSTRAINT ck_docket_chunks_bounds CHECK (lo >= 0 AND hi >= lo)
);

COMMENT ON COLUMN docket_chunks.lo IS 'first index';

COMMENT ON COLUMN docket_chunks.hi IS 'last index + 1';

COMMENT ON COLUMN docket_chunks.lost IS 'takeovers of leases that were never released';

COMMENT ON COLUMN docket_chunks.failed IS 'items that failed';

COMMENT ON COLUMN docket_chunks.errors IS 'of failed items by index, and what stopped it as fatal';

CREATE TABLE docket_schema (
    version INTEGER NOT NULL,
    applied_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT pk_docket_schema PRIMARY KEY (version)
);

INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, item_index, input_hash, output_type, output_data, output_json, checksum, ttl, created_at, expires_at, claimed_at, output_shape)
VALUES ('\x0d583c74c253ed654356986ac0b18816aa6ec4cd4a03b0e3865a83d6a03ce315', 'failed', 'checkout', 'charge', '2', '', NULL, 'abababababababababababababababababababababababababababababababab', 'shop.ChargeResult', '\x0801', '{"id": "ch_1"}', '\x09e197c58906d6cfc01660b66fdf5cc470d9973bc3d052a334192f6eaba6ab20', 3600.0, '2024-03-04 13:27:32.688847+00:00', '2024-03-04 14:27:32.699952+00:00', NULL, NULL);

INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, item_index, input_hash, output_type, output_data, output_json, checksum, ttl, created_at, expires_at, claimed_at, output_shape)
VALUES ('\x11a23de71be20df476d4f09e576c95f0c4216113a8e1b487be624043b5f9f04f', 'done', 'checkout', 'charge', '2', '', NULL, 'abababababababababababababababababababababababababababababababab', 'shop.ChargeResult', '\x0801', '{"id": "ch_1"}', '\x5dcae7e62eceafb9eb21ede6cafb1495b56a8176f6ebf8fff6b6d7259d8885e9', 3600.0, '2024-03-04 13:27:32.661387+00:00', '2024-03-04 14:27:32.678745+00:00', NULL, NULL);

INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, item_index, input_hash, output_type, output_data, output_json, checksum, ttl, created_at, expires_at, claimed_at, output_shape)
VALUES ('\x395a26d58114a4f11481d5bff81885b669788bf97bf583348b5ff2f6ce4817c0', NULL, 'checkout', 'infer', '', '', NULL, 'cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd', 'shop.Inference', '\x0802', NULL, '\xc8bf3bb5db13f538027732f09681ed1aec33c4d5a33238db5591fb71fec389a9', NULL, '2024-03-04 13:27:32.726578+00:00', NULL, NULL, NULL);

INSERT INTO docket_claims (cache_key, owner, lease_until, claimed_at)
VALUES ('\x0101010101010101010101010101010101010101010101010101010101010101', 'second', '2024-03-04 13:28:02.733035+00:00', NULL);

INSERT INTO docket_claims (cache_key, owner, lease_until, claimed_at)
VALUES ('\x395a26d58114a4f11481d5bff81885b669788bf97bf583348b5ff2f6ce4817c0', 'first', '2024-03-04 13:27:32.726639+00:00', NULL);

INSERT INTO docket_executions (graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at, duration_ms, error_code, error_message, worker, task_id)
VALUES ('checkout', 'done', 'charge', '', 1, 1, False, 'SUCCEEDED', '2023-05-07 12:00:00.123456+00:00', 1.5, NULL, NULL, '', NULL);

INSERT INTO docket_executions (graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at, duration_ms, error_code, error_message, worker, task_id)
VALUES ('checkout', 'done', 'ship', '', 1, 1, False, 'SUCCEEDED', '2023-05-07 12:00:00.123456+00:00', 1.5, NULL, NULL, '', NULL);

INSERT INTO docket_runs (graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner, lease_until, lost, failures, wake_at, progress, error, result, result_checksum, created_at, started_at, ended_at, updated_at, expires_at, items_failed, items_allowed, message, lanes)
VALUES ('checkout', 'done', NULL, NULL, 0, 'shop.Shipment', '\x6a6f62', '\x6464646464646464646464646464646464646464646464646464646464646464', 'SUCCEEDED', 0, 1, 'first', NULL, 0, 0, NULL, NULL, NULL, '\x0a0178', '\xa857c0a1898af16a2a1fdb4cbaae17c3f59f9aa897c37a62777b934ad93000b5', '2024-03-04 13:27:32.649598+00:00', '2024-03-04 13:27:32.649598+00:00', '2024-03-04 13:27:32.678745+00:00', '2024-03-04 13:27:32.678745+00:00', '2024-03-05 13:27:32.678745+00:00', NULL, NULL, NULL, NULL);

INSERT INTO docket_runs (graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner, lease_until, lost, failures, wake_at, progress, error, result, result_checksum, created_at, started_at, ended_at, updated_at, expires_at, items_failed, items_allowed, message, lanes)
VALUES ('checkout', 'failed', NULL, NULL, 0, 'shop.Shipment', '\x6a6f62', '\x6464646464646464646464646464646464646464646464646464646464646464', 'FAILED', 0, 1, 'first', NULL, 0, 0, NULL, NULL, '{"args": ["sold out", null], "code": "DC200"}', NULL, NULL, '2024-03-04 13:27:32.684993+00:00', '2024-03-04 13:27:32.684993+00:00', '2024-03-04 13:27:32.699952+00:00', '2024-03-04 13:27:32.699952+00:00', NULL, NULL, NULL, NULL, NULL);

INSERT INTO docket_runs (graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner, lease_until, lost, failures, wake_at, progress, error, result, result_checksum, created_at, started_at, ended_at, updated_at, expires_at, items_failed, items_allowed, message, lanes)
VALUES ('checkout', 'parked', NULL, NULL, 1, 'shop.Shipment', '\x6a6f62', '\x6464646464646464646464646464646464646464646464646464646464646464', 'WAITING', 0, 1, 'first', NULL, 0, 0, '2024-03-04 13:27:37.708581+00:00', NULL, NULL, NULL, NULL, '2024-03-04 13:27:32.705692+00:00', '2024-03-04 13:27:32.705692+00:00', NULL, '2024-03-04 13:27:32.708581+00:00', NULL, NULL, NULL, NULL, NULL);

INSERT INTO docket_schema (version, applied_at)
VALUES (7, '2024-03-04 13:27:32.644696+00:00');
