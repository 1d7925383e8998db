"""Cases of test_contrastive.py and test_multimodal.py, which the same processes run."""

from tests.parallel import contrastive_cases, multimodal_cases

CASES = {**contrastive_cases.CASES, **multimodal_cases.CASES}
