"""The Hugging Face Hub, where it cannot be reached: said at once, rather than after every library's own retries."""

import http.client
import urllib.error
import urllib.request

import datasets
from huggingface_hub import constants

ANSWER_SECONDS = 10.0


def offline_if_unreachable() -> None:
    """Has huggingface_hub and datasets look only into their caches, from here on, where the Hub does not answer."""
    if constants.HF_HUB_OFFLINE:
        return
    asked = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(asked, timeout=ANSWER_SECONDS):
            return
    except urllib.error.HTTPError:
        return  # an answer too
    except (OSError, http.client.HTTPException):
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
