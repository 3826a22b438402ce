"Measures worked out by hand or by scikit-image, and what they are worked out on."

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from enhance_lib.toolbox.features import FeatureNet

# what networks trained on ImageNet expect of each channel
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
COLORS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # features that are the colors


def batch(*shape, seed=0):
    "A tensor of random numbers in [0, 1)."
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def flat(level, size=(16, 16), mode='RGB'):
    "A photo all of one level."
    return Image.fromarray(np.full((*size[::-1], 3)[: 3 if mode == 'RGB' else 2], level, np.uint8))


def feature_net_of(*weights):
    "A network of 1×1 layers (outputs, inputs), each tapped, so that its features are sums."
    layers = nn.Sequential(*(nn.Conv2d(len(w[0]), len(w), 1, bias=False) for w in weights))
    with torch.no_grad():
        for layer, w in zip(layers, weights):
            layer.weight.copy_(torch.tensor(w)[:, :, None, None])
    return FeatureNet(layers, tuple(range(len(weights))))


def distance_by_hand(a, b, weights):
    "The distance between two pictures (3, H, W) for `feature_net_of(*weights)`, in plain NumPy."
    a, b = ((x.transpose(1, 2, 0).astype(float) - MEAN) / STD for x in (a, b))
    found = []
    for w in weights:
        a, b = a @ np.array(w).T, b @ np.array(w).T
        p, t = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (a, b))
        found.append(((p - t) ** 2).sum(2).mean())
    return np.mean(found)


def skimage_psnr(a, b, data_range):
    with np.errstate(divide='ignore'):
        return peak_signal_noise_ratio(a, b, data_range=data_range)


def skimage_ssim(a, b, data_range, channel_axis):
    return structural_similarity(
        *(np.asarray(x, float) for x in (a, b)),
        data_range=data_range,
        channel_axis=channel_axis,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
