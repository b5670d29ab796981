"""Optional packages."""

import pytest

from lightning_lip.reporting.extras import MissingExtraError, extra


def test_a_missing_extra_names_the_remedy():
    with pytest.raises(MissingExtraError, match=r'pip install "lightning-lip\[paper\]"'):
        extra("lightning_lip_no_such_module.stats")
