"""One pass of an adapter, as most tests of adapters begin."""


def traced(adapter, batch):
    """The batch as the adapter prepares it, its features, and its head's trace, of `batch`: images and targets."""
    prepared = adapter.prepare(*batch)
    features = adapter.features(prepared)
    return prepared, features, adapter.head(features, prepared)
