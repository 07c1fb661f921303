"""What `/metrics` shows, in the format of Prometheus: requests, tokens, latencies, and where the system stands."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from ..folder.status import serving_depths
from ..folder.system import SystemFolder
from ..model.modeling import S3TModel
from ..operations.pending import PendingRequests


CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class PrometheusMetrics:
    """What a server measures: see [`~hf_s3t.server.measuring.Metrics`]. Each server has counters of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ("route", "status")
        self._requests = Counter("hf_s3t_requests", "Requests that ended.", labels, registry=registry)
        self._latency = Histogram(
            "hf_s3t_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt = Counter("hf_s3t_prompt_tokens", "Tokens of prompts that were answered.", registry=registry)
        self._completion = Counter("hf_s3t_completion_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "hf_s3t_first_token_seconds",
            "Seconds from a request to the first token of a row.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._batches = Histogram(
            "hf_s3t_batch_rows", "Rows of batches when they begin.", buckets=_ROWS, registry=registry
        )
        self._erased = Counter("hf_s3t_erased_examples", "Examples that this server erased.", registry=registry)
        self._unlearning = Histogram(
            "hf_s3t_unlearning_seconds",
            "Seconds that an erasure by this server took until it was in force.",
            buckets=_SECONDS,
            registry=registry,
        )

    def request_done(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        """An answer is complete."""
        self._prompt.inc(prompt)
        self._completion.inc(completion)

    def first_token(self, seconds: float) -> None:
        """The first token of a row was made."""
        self._first.observe(seconds)

    def batch(self, size: int) -> None:
        """A batch begins."""
        self._batches.observe(size)

    def erasure(self, examples: int, seconds: float) -> None:
        """A deletion is in force."""
        self._erased.inc(examples)
        self._unlearning.observe(seconds)


class SystemMetrics(Collector):
    """
    Where a system stands, looked at when somebody asks: what other processes delete or grow shows too.

    Args:
        model ([`~hf_s3t.S3TModel`]): The model that is served.
    """

    def __init__(self, model: S3TModel):
        self._model = model

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is is not looked at when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        model = self._model
        is_exhausted = model.is_exhausted
        folder = model.folder
        valid = folder.valid_stages
        shards = range(folder.config.num_shards)
        counts = [sum(key.shard == shard for key in valid) for shard in shards]
        yield _by_shard("hf_s3t_depth", "Depth of the stack that serves.", serving_depths(folder, valid))
        yield _by_shard("hf_s3t_stages", "Stages that are there and valid.", counts)
        yield GaugeMetricFamily("hf_s3t_examples", "Examples that are in.", len(folder.table))
        yield GaugeMetricFamily("hf_s3t_deletions", "Deletions in the ledger.", folder.ledger.num_deletions)
        yield GaugeMetricFamily("hf_s3t_pending_examples", "Examples that wait to be erased.", _pending(folder))
        yield GaugeMetricFamily("hf_s3t_exhausted", "1 if no shard is left to answer.", float(is_exhausted))
        yield GaugeMetricFamily(
            "hf_s3t_failures", "What could not be done yet and is tried again.", len(model.status()["failures"])
        )


def exposition(metrics: object, system: SystemMetrics) -> bytes:
    """
    All of it as text.

    Args:
        metrics: What the server measures; what is no [`PrometheusMetrics`] is left out.
        system ([`SystemMetrics`]): Where the system stands.
    """
    registry = CollectorRegistry()
    registry.register(system)
    measured = generate_latest(metrics.registry) if isinstance(metrics, PrometheusMetrics) else b""
    return measured + generate_latest(registry)


def _by_shard(name: str, what: str, values: Iterable[int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, what, labels=["shard"])
    for shard, value in enumerate(values):
        family.add_metric([str(shard)], value)
    return family


def _pending(folder: SystemFolder) -> int:
    return len(PendingRequests(folder).ids())
