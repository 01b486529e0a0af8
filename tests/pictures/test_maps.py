"""Maps as colours: a constant map has one colour, zero is the middle of signed colours, an overlay keeps its image."""

import numpy as np
import pytest
import torch

from focalnet import inspect
from focalnet.models.processing import published_processor
from focalnet.pictures.explanation import explanation
from focalnet.pictures.maps import coloured, limits, overlay, seen_image, to_8_bit


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-30])
def test_a_constant_map_and_its_rounding_errors_have_one_colour(value, signed):
    constant = np.full((5, 7), value, dtype=np.float32) * (1 + 1e-6 * np.random.default_rng(0).standard_normal((5, 7)))
    drawn = to_8_bit(coloured(constant, signed))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 1
    grey = np.full((20, 30, 3), 0.5)
    assert len(np.unique(to_8_bit(overlay(grey, constant, signed=signed)).reshape(-1, 3), axis=0)) == 1


def test_zero_is_the_middle_of_signed_colours_and_the_ends_are_the_extremes():
    low, high = limits(np.array([[-1.0, 4.0]]), signed=True)
    assert (low, high) == (-4, 4)
    purple, white, orange = coloured(np.array([-4.0, 0.0, 4.0]), signed=True)
    assert white.min() > 0.95 and purple[2] > purple[1] and orange[0] > orange[2]
    assert limits(np.array([[2.0, 4.0]]), signed=False) == (2, 4)


def test_values_that_are_not_finite_are_left_out_of_the_limits():
    values = np.array([[np.nan, 1.0, 3.0]])
    assert limits(values, signed=False) == (1, 3)
    assert np.isfinite(coloured(values, signed=False)).all()


def test_opacity_leads_from_the_image_to_the_map():
    image = np.random.default_rng(0).random((32, 32, 3))
    map_ = np.arange(16.0).reshape(4, 4)
    np.testing.assert_allclose(overlay(image, map_, 0), image)
    only_map = overlay(image, map_, 1)
    np.testing.assert_allclose(only_map, overlay(1 - image, map_, 1))
    off = [np.abs(overlay(image, map_, opacity) - only_map).mean() for opacity in (0, 0.3, 0.6, 1)]
    assert off == sorted(off, reverse=True)


def test_the_image_that_a_model_sees_is_the_file_before_normalisation():
    from PIL import Image

    from focalnet import FocalNetConfig

    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    processor = published_processor(FocalNetConfig())
    seen = seen_image(processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0], processor)
    assert np.abs(seen - pixels[16:240, 16:240] / 255).max() < 1e-3


def test_the_figure_of_a_constant_image_has_constant_maps():
    """In a block that sees no border every panel is one colour."""
    from focalnet import FocalNetConfig, FocalNetModel

    config = FocalNetConfig(embed_dim=8, depths=[1], focal_levels=[2], focal_windows=[3], image_size=32)
    model = FocalNetModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3)
            if "focal_layers" in name:
                centre = parameter[..., parameter.shape[-1] // 2, parameter.shape[-1] // 2].clone()
                parameter.zero_()
                parameter[..., parameter.shape[-1] // 2, parameter.shape[-1] // 2] = centre
    image = np.full((32, 32, 3), 0.4)
    found = inspect(model, torch.full((1, 3, 32, 32), 0.4))
    figure = explanation(image, found.maps, [("grey", 1.0)], "constant")
    panels = [axes for part in figure.subfigs[1:] for axes in part.axes if axes.images]
    assert len(panels) == 4
    figure.canvas.draw()
    for panel in panels:
        box = panel.get_window_extent().shrunk(0.9, 0.9)
        rows = slice(round(figure.bbox.height - box.y1), round(figure.bbox.height - box.y0))
        drawn = np.asarray(figure.canvas.buffer_rgba())[rows, round(box.x0) : round(box.x1), :3]
        assert drawn.size and (drawn == drawn[:1, :1]).all(), panel.get_title(loc="left")
