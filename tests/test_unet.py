"""The U-Net: encoders of timm's, two groups, phases, and the published ones."""

import subprocess
import sys
import warnings
from functools import cache

import numpy as np
import pytest
import timm
import torch
from beside import SHARED, needs
from common import one_line, pieces
from fastai.layers import NormType
from fastai.optimizer import Adam
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn
from torch.nn import functional as F

import enhance_lib.unet as module
from enhance_lib.applications.scoreboard import TASKS
from enhance_lib.crappify import RECIPES
from enhance_lib.toolbox.datasets import sample_photo
from enhance_lib.toolbox.errors import EnhanceError, EnhanceWarning
from enhance_lib.toolbox.features import timm_network
from enhance_lib.toolbox.files import find_photos, open_photo
from enhance_lib.toolbox.models import WEIGHTS, load_model
from enhance_lib.toolbox.pairs import recipe_dls
from enhance_lib.toolbox.tensors import to_tensor
from enhance_lib.toolbox.training import set_seed
from enhance_lib.unet import (
    UNet,
    encoder_layers,
    fit_in_phases,
    get_unet,
    two_groups,
    unet_parameters,
)

SMALL = {'model_name': 'test_resnet', 'pretrained': False}
PLAIN = {'blur': False, 'self_attention': False}
VAL = SHARED / 'data' / 'bsds500' / 'val'
has_val = needs(VAL)
both = pytest.mark.parametrize('name', ['unet-mse', 'unet-feature'])


def small_dls(n=4, size=64, bs=2, recipe=RECIPES['gan'], seed=0):
    return recipe_dls(pieces(n, seed=seed), pieces(2, seed=1), recipe, size, bs, augment=False)


@cache
def the_model(name):
    return load_model(name)


# Encoders


@pytest.mark.parametrize(
    'name', ['resnet18', 'test_resnet', 'mobilenetv3_small_050', 'efficientnet_b0']
)
def test_the_layers_of_an_encoder_are_those_of_timm(name):
    "Run one after another they give what timm itself gives as the last features."
    torch.manual_seed(0)
    network = timm_network(name, pretrained=False).eval()
    told = timm.create_model(name, pretrained=False, features_only=True).eval()
    lost = told.load_state_dict(network.state_dict(), strict=False)
    assert not lost.missing_keys
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(nn.Sequential(*encoder_layers(network))(x), told(x)[-1])


@pytest.mark.parametrize(
    'name, millions',
    [
        ('resnet34', 41.2),
        ('swsl_resnet18', 31.1),
        ('resnet10t', 25),
        ('regnetx_002', 11.2),
        ('ecaresnet101d_pruned', 232),
    ],
)
def test_parameters_are_counted_without_building(name, millions):
    "fastai's own `DynamicUnet` on these has as many, without our one factor."
    assert unet_parameters(name) / 1e6 == pytest.approx(millions, abs=0.5)


def test_parameters_are_those_of_fastai():
    "Of its U-Net on torchvision's ResNet-18, which has the same layers as timm's."
    from fastai.vision.models.unet import DynamicUnet
    from torchvision.models import resnet18

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        body = nn.Sequential(*[*resnet18().children()][:-2])
        theirs = DynamicUnet(body, 3, (128, 128), norm_type=NormType.Weight)
    lengths = 3  # of the last convolution, which has no weight norm here
    assert unet_parameters('resnet18') == sum(p.numel() for p in theirs.parameters()) - lengths


def test_an_unknown_encoder_suggests_the_nearest():
    with pytest.raises(EnhanceError, match="'resnet81'.*Did you mean .*resnet18") as error:
        get_unet(small_dls(), 'resnet81')
    one_line(error)


@pytest.mark.parametrize(
    'name', ['vit_tiny_patch16_224', 'densenet121', 'hrnet_w18', 'swin_tiny_patch4_window7_224']
)
def test_an_encoder_that_a_unet_cannot_be_built_on(name):
    "Said before anything is trained or even built."
    with pytest.raises(EnhanceError, match=f'cannot be built on {name}') as error:
        get_unet(small_dls(), name, pretrained=False)
    one_line(error)


def test_pretrained_weights_from_a_file(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(7)
    there = timm_network('test_resnet', pretrained=False)
    save_file(there.state_dict(), tmp_path / 'encoder.safetensors')
    learn = get_unet(small_dls(), 'test_resnet', tmp_path / 'encoder.safetensors', **PLAIN)
    wanted = nn.Sequential(*encoder_layers(there)).state_dict()
    told = learn.model.net.layers[0].state_dict()
    assert all(torch.equal(told[k], v) for k, v in wanted.items()) and wanted


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    (tmp_path / 'other.safetensors').write_bytes(b'nothing')
    for pretrained in (True, tmp_path / 'other.safetensors'):
        with pytest.raises(EnhanceError, match='timm cannot give test_resnet'):
            get_unet(small_dls(), 'test_resnet', pretrained)
    with pytest.raises(EnhanceError, match='no file .*gone.safetensors'):
        get_unet(small_dls(), 'test_resnet', tmp_path / 'gone.safetensors')


def test_a_large_unet_warns_before_it_is_built(monkeypatch):
    monkeypatch.setattr(module, 'LARGE', 1_000_000)
    with pytest.warns(EnhanceWarning, match='test_resnet has 3 million.*0.0 GB'):
        get_unet(small_dls(), **SMALL, **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter('error', EnhanceWarning)
        monkeypatch.setattr(module, 'LARGE', 3_000_000)
        get_unet(small_dls(), **SMALL, **PLAIN)


# The model


def test_importing_the_unet_costs_only_torch():
    "fastai and timm come when one is made."
    heavy = ('fastai', 'timm', 'pandas', 'matplotlib', 'skimage', 'torchvision')
    code = f'import sys, enhance_lib.unet; print([n for n in {heavy} if n in sys.modules])'
    told = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert told.stdout == '[]\n'


@pytest.mark.parametrize('options', [{}, {'blur': True, 'self_attention': True}])
@pytest.mark.parametrize('weight_norm', [True, False])
def test_untrained_it_gives_the_photo_back(options, weight_norm):
    model = UNet('test_resnet', weight_norm=weight_norm, **options)
    x = torch.rand(2, 3, 64, 96)
    assert torch.equal(model(x), x)
    normed = [m for m in model.net.layers[4:].modules() if hasattr(m, 'weight_g')]
    assert bool(normed) == weight_norm


def test_options_change_the_network():
    plain = unet_parameters('test_resnet')
    assert unet_parameters('test_resnet', self_attention=True) > plain
    assert unet_parameters('test_resnet', blur=True) == plain  # means have no parameters
    assert any(isinstance(m, nn.AvgPool2d) for m in UNet('test_resnet', blur=True).net.modules())


def trained_a_little(seed=0):
    "A U-Net that does something, with random weights."
    torch.manual_seed(seed)
    model = UNet('test_resnet')
    with torch.no_grad():
        for p in model.net.layers[-2].parameters():  # the last convolution, zero until then
            p.add_(0.05 * torch.randn(p.shape))
    return model.eval()


def test_colors_are_normalized_as_the_encoder_was_trained():
    model = trained_a_little()
    config = timm.data.resolve_model_data_config(timm.create_model('test_resnet'))
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    x, seen = torch.rand(1, 3, 64, 64), []
    model.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(seen[0], (x - mean) / std)
    assert float((y - x).abs().mean()) > 0.001


@both
@pytest.mark.parametrize('mode, size', [('L', (1, 1)), ('LA', (70, 45)), ('RGBA', (33, 200))])
def test_photos_of_any_size_and_mode_come_out_as_they_went_in(name, mode, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    photo = Image.fromarray(pixels).convert(mode)
    better = the_model(name).predict(photo)
    assert (better.mode, better.size) == (mode, size)
    if mode.endswith('A'):
        assert better.getchannel('A').tobytes() == photo.getchannel('A').tobytes()


@both
def test_half_precision_costs_next_to_nothing(name):
    clean = sample_photo('coffee').crop((100, 50, 292, 242))
    degraded = RECIPES['gan'](clean, 0, 'coffee')
    outputs = [np.asarray(the_model(name).predict(degraded, fast=fast)) for fast in (True, False)]
    a, b = (peak_signal_noise_ratio(np.asarray(clean), output) for output in outputs)
    assert a == pytest.approx(b, abs=0.05)


# Learner and phases


def test_encoder_and_rest_are_two_groups():
    learn = get_unet(small_dls(), **SMALL)
    encoder, rest = two_groups(learn.model)
    assert {id(p) for p in encoder} == {id(p) for p in learn.model.net.layers[0].parameters()}
    everything = [id(p) for p in learn.model.parameters()]
    assert sorted(map(id, [*encoder, *rest])) == sorted(everything)


def weights_of(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def test_a_frozen_encoder_stays_but_for_batch_norm():
    learn = get_unet(small_dls(), **SMALL, **PLAIN, loss_func=F.l1_loss)
    before = weights_of(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit(2, 0.01)
    norms = {
        f'net.layers.0.{name}.{kind}'
        for name, layer in learn.model.net.layers[0].named_modules()
        if isinstance(layer, nn.BatchNorm2d)
        for kind in ('weight', 'bias')
    }
    for name, p in learn.model.named_parameters():
        if name.startswith('net.layers.0.') and name not in norms:
            assert torch.equal(p, before[name]), name
    changed = [n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])]
    assert any(name.startswith('net.layers.4') for name in changed)  # the first decoder step


def test_what_is_frozen_again_stays():
    "Momentum and weight decay of the phase before must not go on moving it."
    learn = get_unet(small_dls(), **SMALL, **PLAIN)
    with learn.no_bar(), learn.no_logging():
        fit_in_phases(learn, 0, 1, rates=(0.1, 0.1))
        before = weights_of(learn.model)
        fit_in_phases(learn, 1, 0, frozen_rate=0.1)
    kernels = [n for n, p in learn.model.named_parameters() if p.dim() == 4 and '.layers.0.' in n]
    after = weights_of(learn.model)
    assert len(kernels) > 5 and all(torch.equal(after[n], before[n]) for n in kernels)


def test_the_rates_are_those_of_image_2():
    "4e-4, then 1e-5 for the encoder and 1e-4 for the rest, in proportion to the batch of 32."
    learn = get_unet(small_dls(bs=2), **SMALL)
    asked = []
    learn.fit_one_cycle = lambda epochs, rate, cbs: asked.append(
        (epochs, rate, [p.requires_grad for p in two_groups(learn.model)[0]])
    )
    fit_in_phases(learn, 3, 5)
    (frozen, rate, _), (unfrozen, rates, grads) = asked
    assert (frozen, unfrozen) == (3, 5) and all(grads)
    assert not all(asked[0][2])
    assert rate == pytest.approx(4e-4 * 2 / 32)
    assert [rates.start, rates.stop] == pytest.approx([1e-5 * 2 / 32, 1e-4 * 2 / 32])
    asked.clear()
    fit_in_phases(learn, 0, 1)
    assert [row[0] for row in asked] == [1]


def test_the_optimizer_is_that_of_image_2():
    learn = get_unet(small_dls(), **SMALL)
    learn.create_opt()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-5)
    assert set(learn.recorder.hps['mom']) == {0.9} and learn.opt.hypers[0]['wd'] == 0.1
    assert 'grad_avg' in learn.opt.state[next(learn.model.parameters())]
    other = get_unet(small_dls(), **SMALL, opt_func=Adam, wd=0.0)
    with other.no_bar(), other.no_logging():
        other.fit(1)
    assert other.opt.hypers[0]['wd'] == 0.0 and 'sqr_mom' in other.opt.hypers[0]


def test_a_pretrained_encoder_begins_frozen(tmp_path):
    from safetensors.torch import save_file

    save_file(timm_network('test_resnet', False).state_dict(), tmp_path / 'e.safetensors')
    learn = get_unet(small_dls(), 'test_resnet', tmp_path / 'e.safetensors', **PLAIN)
    assert not next(learn.model.net.layers[0].parameters()).requires_grad
    assert next(get_unet(small_dls(), **SMALL).model.net.layers[0].parameters()).requires_grad


def test_it_learns():
    "A veil over the photos is lifted: the error is halved, at the least."
    veil = [Image.blend(p, Image.new('RGB', p.size, 'white'), 0.4) for p in pieces(4)]
    x, y = (torch.cat([to_tensor(p) for p in photos]) for photos in (veil, pieces(4)))
    x, y = x[..., :64, :64], y[..., :64, :64]
    set_seed(0)
    model = UNet('test_resnet')
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_photos_that_would_have_to_be_enlarged():
    with pytest.raises(EnhanceError, match='32×32.*64×64.*does not enlarge'):
        get_unet(small_dls(recipe=TASKS['x2']), **SMALL)


# What is published


@both
def test_published_weights_are_small(name):
    "At most 8 MB, in half precision."
    assert (WEIGHTS / f'{name}.safetensors').stat().st_size <= 8_000_000
    assert the_model(name).card['task'] == 'gan'


def on_val(name):
    "What the card says of BSDS500 val; `make bench` measures it anew."
    return the_model(name).card['scores']['BSDS500 val']


def test_unet_mse_reaches_its_goals():
    score = on_val('unet-mse')
    assert score['output'] - score['input'] >= 1.2
    assert score['SSIM'][1] - score['SSIM'][0] >= 0.02


def test_unet_feature_reaches_its_goals():
    score, mse = on_val('unet-feature'), on_val('unet-mse')
    before, after = score['feature distance']
    assert after <= 0.75 * before and after < mse['feature distance'][1]
    assert score['output'] >= score['input']


def test_unet_feature_is_a_quarter_under_unet_mse():
    feature, mse = (on_val(f'unet-{name}')['feature distance'][1] for name in ('feature', 'mse'))
    assert feature <= 0.75 * mse


@has_val
@both
def test_the_card_is_right(name):
    "Every tenth photo gains about as much as the card says of all, by scikit-image."
    gains = []
    for path in find_photos(VAL)[::10]:
        degraded, clean = RECIPES['gan'].pair(open_photo(path), 0, path.name, 256)
        better = the_model(name).predict(degraded)
        a, b = (
            peak_signal_noise_ratio(np.asarray(clean), np.asarray(p)) for p in (degraded, better)
        )
        gains.append(b - a)
    said = on_val(name)
    assert np.mean(gains) == pytest.approx(said['output'] - said['input'], abs=0.8)
