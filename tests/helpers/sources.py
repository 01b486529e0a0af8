"""The published FocalNets, reimplemented: the authors' (three tasks) and timm's.

Part names, settings and order of operations are those of the published code. tests/data/golden holds outputs and
gradients of the published code to check them.
"""

import torch
import torch.nn.functional as F
from golden import MODELS, format_of, tensors_of
from torch import nn


class LayerNorm2d(nn.LayerNorm):
    """timm's LayerNorm over the channels of NCHW."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep) / keep


def focal_layers(dim, focal_window, focal_level):
    kernels = [focal_window + 2 * level for level in range(focal_level)]
    convs = [nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False) for k in kernels]
    return nn.ModuleList(nn.Sequential(conv, nn.GELU()) for conv in convs)


class AuthorsModulation(nn.Module):
    """The authors' modulation. ``flag`` is the name of normalize_modulator, which differs between their code bases.

    If ``keeps`` is set, the gates and the modulator become attributes, as in the classification code.
    """

    keeps = True

    def __init__(self, dim, focal_window=3, focal_level=2, postln=False, normalize=False, flag="normalize_modulator"):
        super().__init__()
        self.focal_level = focal_level
        self.use_postln_in_modulation = postln
        setattr(self, flag, normalize)
        self._normalize = flag
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1)
        self.h = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.focal_layers = focal_layers(dim, focal_window, focal_level)
        if postln:
            self.ln = nn.LayerNorm(dim)

    def gates_of(self, gates):
        return gates

    def forward(self, x):
        dim = x.shape[-1]
        q, ctx, gates = self.f(x).permute(0, 3, 1, 2).contiguous().split([dim, dim, self.focal_level + 1], 1)
        gates = self.gates_of(gates)
        total = 0
        for level, layer in enumerate(self.focal_layers):
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        total = total + self.act(ctx.mean(2, keepdim=True).mean(3, keepdim=True)) * gates[:, self.focal_level :]
        if getattr(self, self._normalize):
            total = total / (self.focal_level + 1)
        modulator = self.h(total)
        if self.keeps:
            self.gates, self.modulator = gates, modulator
        out = (q * modulator).permute(0, 2, 3, 1).contiguous()
        if self.use_postln_in_modulation:
            out = self.ln(out)
        return self.proj_drop(self.proj(out))


class Mlp(nn.Module):
    def __init__(self, dim, act=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = act()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class AuthorsBlock(nn.Module):
    """The authors' block on tokens (B, H * W, C). The caller sets H and W first."""

    def __init__(self, dim, modulation, postln=False, layerscale=False, drop_path=0.0):
        super().__init__()
        self.use_postln = postln
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = modulation
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.gamma_1 = self.gamma_2 = 1.0
        if layerscale:
            self.gamma_1, self.gamma_2 = (nn.Parameter(1e-4 * torch.ones(dim)) for _ in range(2))
        self.H = self.W = None

    def forward(self, x):
        batch, tokens, dim = x.shape
        update = x if self.use_postln else self.norm1(x)
        update = self.modulation(update.view(batch, self.H, self.W, dim)).view(batch, tokens, dim)
        x = x + self.drop_path(self.gamma_1 * (self.norm1(update) if self.use_postln else update))
        update = self.norm2(self.mlp(x)) if self.use_postln else self.mlp(self.norm2(x))
        return x + self.drop_path(self.gamma_2 * update)


class XDecoderBlock(AuthorsBlock):
    """The block of X-Decoder and SEEM: a depthwise convolution before each branch, and the norm after the sum."""

    def __init__(self, dim, modulation, **settings):
        super().__init__(dim, modulation, **settings)
        self.dw1, self.dw2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))

    def convolved(self, x, conv):
        grid = x.transpose(1, 2).unflatten(2, (self.H, self.W))
        return (grid + conv(grid)).flatten(2).transpose(1, 2).contiguous()

    def forward(self, x):
        batch, tokens, dim = x.shape
        x = self.convolved(x, self.dw1)
        update = x if self.use_postln else self.norm1(x)
        update = self.modulation(update.view(batch, self.H, self.W, dim)).view(batch, tokens, dim)
        x = x + self.drop_path(self.gamma_1 * update)
        x = self.convolved(self.norm1(x) if self.use_postln else x, self.dw2)
        if not self.use_postln:
            return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        return self.norm2(x + self.drop_path(self.gamma_2 * self.mlp(x)))


class AuthorsEmbed(nn.Module):
    """Embeds images or maps, NCHW in and out. With ``pads`` it pads to whole patches, as the detection code does."""

    def __init__(self, in_chans, dim, patch, conv_embed, stem_padding=2, pads=False):
        super().__init__()
        self.patch, self.pads = patch, pads
        kernel, stride, padding = (patch, patch, 0)
        if conv_embed:
            kernel, stride, padding = (7, 4, stem_padding) if in_chans == 3 else (3, 2, 1)
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        if self.pads:
            x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AuthorsStage(nn.Module):
    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x):
        """Maps (B, C, H, W) -> (before the downsampling, after it)."""
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            block.H, block.W = height, width
            tokens = block(tokens)
        before = tokens.transpose(1, 2).unflatten(2, (height, width))
        return before, before if self.downsample is None else self.downsample(before)


class AuthorsFocalNet(nn.Module):
    """The authors' classifier, or with ``detection`` a backbone that returns the normalised maps of all stages."""

    def __init__(
        self,
        embed_dim,
        depths,
        focal_levels=(2, 2, 2, 2),
        focal_windows=(3, 3, 3, 3),
        patch_size=4,
        num_classes=10,
        use_conv_embed=False,
        use_postln=False,
        use_layerscale=False,
        use_postln_in_modulation=False,
        normalize_modulator=False,
        drop_path_rate=0.0,
        detection=False,
        img_size=None,
    ):
        super().__init__()
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.patch_embed = AuthorsEmbed(3, embed_dim, patch_size, use_conv_embed, 3 if detection else 2, detection)
        stages = []
        for stage, dim in enumerate(dims):
            blocks = [
                AuthorsBlock(
                    dim,
                    AuthorsModulation(
                        dim, focal_windows[stage], focal_levels[stage], use_postln_in_modulation, normalize_modulator
                    ),
                    use_postln,
                    use_layerscale,
                    drop_path_rate,
                )
                for _ in range(depths[stage])
            ]
            last = stage == len(depths) - 1
            stages.append(
                AuthorsStage(blocks, None if last else AuthorsEmbed(dim, 2 * dim, 2, use_conv_embed, pads=detection))
            )
        self.layers = nn.ModuleList(stages)
        self.detection = detection
        if detection:
            for stage, dim in enumerate(dims):
                self.add_module(f"norm{stage}", nn.LayerNorm(dim))
        else:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x):
        x, maps = self.patch_embed(x), []
        for stage, layer in enumerate(self.layers):
            before, x = layer(x)
            if self.detection:
                norm = getattr(self, f"norm{stage}")
                maps.append(norm(before.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous())
        return tuple(maps) if self.detection else self.head(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


class TimmModulation(nn.Module):
    def __init__(self, dim, focal_window=3, focal_level=2, use_post_norm=False, normalize_modulator=False):
        super().__init__()
        self.normalize_modulator = normalize_modulator
        self.input_split = [dim, dim, focal_level + 1]
        self.f = nn.Conv2d(dim, sum(self.input_split), 1)
        self.h = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(0.0)
        self.focal_layers = focal_layers(dim, focal_window, focal_level)
        self.norm = LayerNorm2d(dim) if use_post_norm else nn.Identity()

    def forward(self, x):
        q, ctx, gates = self.f(x).split(self.input_split, 1)
        total = 0
        for level, layer in enumerate(self.focal_layers):
            ctx = layer(ctx)
            total = total + ctx * gates[:, level : level + 1]
        total = total + self.act(ctx.mean((2, 3), keepdim=True)) * gates[:, len(self.focal_layers) :]
        if self.normalize_modulator:
            total = total / (len(self.focal_layers) + 1)
        return self.proj_drop(self.proj(self.norm(q * self.h(total))))


class TimmMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerScale2d(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(value * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class TimmBlock(nn.Module):
    def __init__(self, dim, modulation, post_norm, layerscale_value, drop_path):
        super().__init__()
        self.norm1 = nn.Identity() if post_norm else LayerNorm2d(dim, eps=1e-5)
        self.modulation = modulation
        self.norm1_post = LayerNorm2d(dim, eps=1e-5) if post_norm else nn.Identity()
        self.ls1 = nn.Identity() if layerscale_value is None else LayerScale2d(dim, layerscale_value)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.Identity() if post_norm else LayerNorm2d(dim, eps=1e-5)
        self.mlp = TimmMlp(dim)
        self.norm2_post = LayerNorm2d(dim, eps=1e-5) if post_norm else nn.Identity()
        self.ls2 = nn.Identity() if layerscale_value is None else LayerScale2d(dim, layerscale_value)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.norm1_post(self.modulation(self.norm1(x)))))
        return x + self.drop_path2(self.ls2(self.norm2_post(self.mlp(self.norm2(x)))))


class TimmDownsample(nn.Module):
    def __init__(self, in_chans, dim, stride, overlap):
        super().__init__()
        kernel, padding = ({4: (7, 2), 2: (3, 1)}[stride]) if overlap else (stride, 0)
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x):
        return self.norm(self.proj(x))


class TimmStage(nn.Module):
    def __init__(self, downsample, blocks):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class TimmHead(nn.Module):
    def __init__(self, dim, num_classes):
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class TimmFocalNet(nn.Module):
    def __init__(
        self,
        embed_dim,
        depths,
        focal_levels=(2, 2, 2, 2),
        focal_windows=(3, 3, 3, 3),
        num_classes=10,
        use_overlap_down=False,
        use_post_norm=False,
        use_post_norm_in_modulation=False,
        normalize_modulator=False,
        layerscale_value=None,
        drop_path_rate=0.0,
    ):
        super().__init__()
        self.stem = TimmDownsample(3, embed_dim, 4, use_overlap_down)
        stages = []
        for stage, depth in enumerate(depths):
            dim = embed_dim * 2**stage
            blocks = [
                TimmBlock(
                    dim,
                    TimmModulation(
                        dim,
                        focal_windows[stage],
                        focal_levels[stage],
                        use_post_norm_in_modulation,
                        normalize_modulator,
                    ),
                    use_post_norm,
                    layerscale_value,
                    drop_path_rate,
                )
                for _ in range(depth)
            ]
            downsample = TimmDownsample(dim // 2, dim, 2, use_overlap_down) if stage else nn.Identity()
            stages.append(TimmStage(downsample, blocks))
        self.layers = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dim, eps=1e-5)
        self.head = TimmHead(dim, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.stem(x))))


def golden_model(name):
    """The model of tests/data/golden called ``name``, with its weights, in evaluation mode."""
    config = dict(MODELS[name]["config"])
    if format_of(name) == "timm":
        model = TimmFocalNet(**config)
    else:
        model = AuthorsFocalNet(**config, detection=format_of(name) == "authors-detection")
    model.load_state_dict(tensors_of(name, "param"))
    return model.eval()
