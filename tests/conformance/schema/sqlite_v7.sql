CREATE TABLE docket_cache (
    cache_key BLOB NOT NULL,
    execution_id TEXT,
    graph TEXT NOT NULL,
    step_name TEXT NOT NULL,
    step_version TEXT NOT NULL,
    item TEXT NOT NULL,
    item_index BIGINT,
    input_hash TEXT NOT NULL,
    output_type TEXT NOT NULL,
    output_data BLOB NOT NULL,
    output_json JSON,
    checksum BLOB NOT NULL,
    ttl DOUBLE,
    created_at DATETIME NOT NULL,
    expires_at DATETIME,
    claimed_at DATETIME,
    output_shape TEXT,
    CONSTRAINT pk_docket_cache PRIMARY KEY (cache_key),
    CONSTRAINT ck_docket_cache_cache_key CHECK (length(cache_key) = 32),
    CONSTRAINT ck_docket_cache_checksum CHECK (length(checksum) = 32)
);

CREATE INDEX ix_docket_cache_run ON docket_cache (execution_id, graph, step_name, item_index) WHERE execution_id IS NOT NULL;

CREATE INDEX ix_docket_cache_expired ON docket_cache (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE docket_executions (
    id INTEGER NOT NULL,
    graph TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    step_name TEXT NOT NULL,
    item TEXT NOT NULL,
    delivery INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    cached BOOLEAN NOT NULL,
    status TEXT NOT NULL,
    started_at DATETIME NOT NULL,
    duration_ms DOUBLE NOT NULL,
    error_code TEXT,
    error_message TEXT,
    worker TEXT NOT NULL,
    task_id TEXT,
    CONSTRAINT pk_docket_executions PRIMARY KEY (id)
);

CREATE INDEX ix_docket_executions_run ON docket_executions (execution_id, graph);

CREATE INDEX ix_docket_executions_step ON docket_executions (step_name, started_at);

CREATE TABLE docket_runs (
    graph TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    task_name TEXT,
    task_id TEXT,
    retries INTEGER NOT NULL,
    target TEXT NOT NULL,
    job BLOB NOT NULL,
    job_digest BLOB NOT NULL,
    state TEXT NOT NULL,
    stage INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    owner TEXT,
    lease_until DATETIME,
    lost INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    wake_at DATETIME,
    progress JSON,
    error JSON,
    result BLOB,
    result_checksum BLOB,
    created_at DATETIME NOT NULL,
    started_at DATETIME,
    ended_at DATETIME,
    updated_at DATETIME NOT NULL,
    expires_at DATETIME,
    items_failed INTEGER,
    items_allowed INTEGER,
    message BLOB,
    lanes JSON,
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

CREATE TABLE docket_claims (
    cache_key BLOB NOT NULL,
    owner TEXT NOT NULL,
    lease_until DATETIME NOT NULL,
    claimed_at DATETIME,
    CONSTRAINT pk_docket_claims PRIMARY KEY (cache_key),
    CONSTRAINT ck_docket_claims_cache_key CHECK (length(cache_key) = 32)
);

CREATE INDEX ix_docket_claims_lease ON docket_claims (lease_until);

CREATE TABLE docket_chunks (
    graph TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    stage INTEGER NOT NULL,
    lo INTEGER NOT NULL,
    hi INTEGER NOT NULL,
    state TEXT NOT NULL,
    owner TEXT,
    epoch INTEGER NOT NULL,
    lease_until DATETIME,
    task_id TEXT,
    retries INTEGER NOT NULL,
    lost INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    errors JSON,
    CONSTRAINT pk_docket_chunks PRIMARY KEY (graph, execution_id, stage, lo),
    CONSTRAINT ck_docket_chunks_state CHECK (state IN ('QUEUED', 'RUNNING', 'WAITING', 'SUCCEEDED', 'FAILED', 'CANCELLED', 'QUARANTINED')),
    CONSTRAINT ck_docket_chunks_bounds CHECK (lo >= 0 AND hi >= lo)
);

CREATE TABLE docket_schema (
    version INTEGER NOT NULL,
    applied_at DATETIME NOT NULL,
    CONSTRAINT pk_docket_schema PRIMARY KEY (version)
);

INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, item_index, input_hash, output_type, output_data, output_json, checksum, ttl, created_at, expires_at, claimed_at, output_shape)
VALUES (x'0d583c74c253ed654356986ac0b18816aa6ec4cd4a03b0e3865a83d6a03ce315', 'failed', 'checkout', 'charge', '2', '', NULL, 'abababababababababababababababababababababababababababababababab', 'shop.ChargeResult', x'0801', '{"id": "ch_1"}', x'09e197c58906d6cfc01660b66fdf5cc470d9973bc3d052a334192f6eaba6ab20', 3600.0, '2024-03-04 13:27:28.693000', '2024-03-04 14:27:28.697000', NULL, NULL);

INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, item_index, input_hash, output_type, output_data, output_json, checksum, ttl, created_at, expires_at, claimed_at, output_shape)
VALUES (x'11a23de71be20df476d4f09e576c95f0c4216113a8e1b487be624043b5f9f04f', 'done', 'checkout', 'charge', '2', '', NULL, 'abababababababababababababababababababababababababababababababab', 'shop.ChargeResult', x'0801', '{"id": "ch_1"}', x'5dcae7e62eceafb9eb21ede6cafb1495b56a8176f6ebf8fff6b6d7259d8885e9', 3600.0, '2024-03-04 13:27:28.670000', '2024-03-04 14:27:28.683000', NULL, NULL);

INSERT INTO docket_cache (cache_key, execution_id, graph, step_name, step_version, item, item_index, input_hash, output_type, output_data, output_json, checksum, ttl, created_at, expires_at, claimed_at, output_shape)
VALUES (x'395a26d58114a4f11481d5bff81885b669788bf97bf583348b5ff2f6ce4817c0', NULL, 'checkout', 'infer', '', '', NULL, 'cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd', 'shop.Inference', x'0802', NULL, x'c8bf3bb5db13f538027732f09681ed1aec33c4d5a33238db5591fb71fec389a9', NULL, '2024-03-04 13:27:28.722000', NULL, NULL, NULL);

INSERT INTO docket_claims (cache_key, owner, lease_until, claimed_at)
VALUES (x'0101010101010101010101010101010101010101010101010101010101010101', 'second', '2024-03-04 13:27:58.724000', NULL);

INSERT INTO docket_executions (graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at, duration_ms, error_code, error_message, worker, task_id)
VALUES ('checkout', 'done', 'charge', '', 1, 1, 0, 'SUCCEEDED', '2023-05-07 12:00:00.123000', 1.5, NULL, NULL, '', NULL);

INSERT INTO docket_executions (graph, execution_id, step_name, item, delivery, attempts, cached, status, started_at, duration_ms, error_code, error_message, worker, task_id)
VALUES ('checkout', 'done', 'ship', '', 1, 1, 0, 'SUCCEEDED', '2023-05-07 12:00:00.123000', 1.5, NULL, NULL, '', NULL);

INSERT INTO docket_runs (graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner, lease_until, lost, failures, wake_at, progress, error, result, result_checksum, created_at, started_at, ended_at, updated_at, expires_at, items_failed, items_allowed, message, lanes)
VALUES ('checkout', 'done', NULL, NULL, 0, 'shop.Shipment', x'6a6f62', x'6464646464646464646464646464646464646464646464646464646464646464', 'SUCCEEDED', 0, 1, 'first', NULL, 0, 0, NULL, NULL, NULL, x'0a0178', x'a857c0a1898af16a2a1fdb4cbaae17c3f59f9aa897c37a62777b934ad93000b5', '2024-03-04 13:27:28.666000', '2024-03-04 13:27:28.666000', '2024-03-04 13:27:28.682000', '2024-03-04 13:27:28.682000', '2024-03-05 13:27:28.682000', NULL, NULL, NULL, NULL);

INSERT INTO docket_runs (graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner, lease_until, lost, failures, wake_at, progress, error, result, result_checksum, created_at, started_at, ended_at, updated_at, expires_at, items_failed, items_allowed, message, lanes)
VALUES ('checkout', 'failed', NULL, NULL, 0, 'shop.Shipment', x'6a6f62', x'6464646464646464646464646464646464646464646464646464646464646464', 'FAILED', 0, 1, 'first', NULL, 0, 0, NULL, NULL, '{"code": "DC200", "args": ["sold out", null]}', NULL, NULL, '2024-03-04 13:27:28.688000', '2024-03-04 13:27:28.688000', '2024-03-04 13:27:28.697000', '2024-03-04 13:27:28.697000', NULL, NULL, NULL, NULL, NULL);

INSERT INTO docket_runs (graph, execution_id, task_name, task_id, retries, target, job, job_digest, state, stage, epoch, owner, lease_until, lost, failures, wake_at, progress, error, result, result_checksum, created_at, started_at, ended_at, updated_at, expires_at, items_failed, items_allowed, message, lanes)
VALUES ('checkout', 'parked', NULL, NULL, 1, 'shop.Shipment', x'6a6f62', x'6464646464646464646464646464646464646464646464646464646464646464', 'WAITING', 0, 1, 'first', NULL, 0, 0, '2024-03-04 13:27:33.706000', NULL, NULL, NULL, NULL, '2024-03-04 13:27:28.700000', '2024-03-04 13:27:28.700000', NULL, '2024-03-04 13:27:28.706000', NULL, NULL, NULL, NULL, NULL);

INSERT INTO docket_schema (version, applied_at)
VALUES (7, '2024-03-04 13:27:28.654000');
