import pytest

from litevae import settings
from litevae.data.config import DataConfig
from litevae.errors import UserError


def test_defaults_are_in_range():
    assert settings.load(DataConfig, None, ()) == DataConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size=15", "size must be 16 or more, got 15"),
        ("batch_size=0", "batch_size must be 1 or more, got 0"),
        ("batch_size=100001", "batch_size must be 100000 or less, got 100001"),
        ("workers=-1", "workers must be 0 or more, got -1"),
        ("workers=1000000", "workers must be 512 or less, got 1000000"),
        ("max_bad_fraction=1", "max_bad_fraction must be below 1, got 1.0"),
        ("crop=centre", "crop must be random or random_resized or native"),
    ],
)
def test_value_out_of_range_is_refused(override, message):
    with pytest.raises(UserError) as caught:
        settings.load(DataConfig, None, [override])
    assert message in str(caught.value)
