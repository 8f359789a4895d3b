# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""OpenTelemetry: requests leave the spans that vLLM gives every request."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.engine

SCRIPT = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    path, collector = sys.argv[1:]
    llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8,
              kv_cache_memory_bytes=1 << 26, gpu_memory_utilization=0.1, disable_log_stats=False,
              otlp_traces_endpoint=collector)
    params = [SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False, extra_args=extra)
              for extra in ({"steps": 4}, {"use_sparsed": 1, "sparsed_block_size": 16})]
    llm.generate([{"prompt_token_ids": [7] * 50}] * 2, params, use_tqdm=False)
"""


@pytest.fixture
def collector():
    """A collector's address, and the spans that it was sent."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(sent).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    server.server_close()


def value_of(attribute):
    return getattr(attribute.value, attribute.value.WhichOneof("value"))


def test_a_collector_gets_a_span_for_each_request(llada_path, collector):
    address, spans = collector
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(llada_path), address],
        env={**os.environ, **environment},
        check=True,
        timeout=300,
    )
    requests = [
        {attribute.key: value_of(attribute) for attribute in span.attributes}
        for span in spans
        if span.name == "llm_request"
    ]
    assert [request["gen_ai.usage.prompt_tokens"] for request in requests] == [50, 50]
    assert [request["gen_ai.usage.completion_tokens"] for request in requests] == [8, 8]
    assert all(request["gen_ai.latency.e2e"] > 0 for request in requests)
