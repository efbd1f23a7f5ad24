import base64
import io

import pytest
import torch
from PIL import Image

from oats_vision.evaluation.thumbnails import thumbnail


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_pictures_of_any_number_of_channels_are_shown(channels):
    kind, data = thumbnail(torch.rand(channels, 40, 30)).split(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg"
    assert (picture.size, picture.mode) == ((30, 40), "RGB")
