"""OpenAI's U-Net in PyTorch, written from its papers and from the names and shapes in its public checkpoints.

It is a function of a state dict, not a tree of modules: what a checkpoint holds is all that it knows, besides the few
things that no checkpoint says.
"""

import math

import torch
from torch.nn import functional


def shapes(
    *, channels, multipliers, num_blocks, attention, image_channels=3, out_channels=6, classes=0, scale_shift=True,
    updown=False,
):  # fmt: skip
    """{name: shape} of a checkpoint. `attention` lists the levels that have it, the finest being 0."""
    emb = 4 * channels
    found = {}

    def affine(name, *shape):
        found[f'{name}.weight'], found[f'{name}.bias'] = shape, shape[:1]

    def block(name, width_in, width):
        affine(f'{name}.in_layers.0', width_in)
        affine(f'{name}.in_layers.2', width, width_in, 3, 3)
        affine(f'{name}.emb_layers.1', width * (2 if scale_shift else 1), emb)
        affine(f'{name}.out_layers.0', width)
        affine(f'{name}.out_layers.3', width, width, 3, 3)
        if width_in != width:
            affine(f'{name}.skip_connection', width, width_in, 1, 1)

    def attend(name, width):
        affine(f'{name}.norm', width)
        affine(f'{name}.qkv', 3 * width, width, 1)
        affine(f'{name}.proj_out', width, width, 1)

    affine('time_embed.0', emb, channels)
    affine('time_embed.2', emb, emb)
    if classes:
        found['label_emb.weight'] = (classes, emb)
    width = channels * multipliers[0]
    affine('input_blocks.0.0', width, image_channels, 3, 3)
    kept, number = [width], 0
    for level, multiplier in enumerate(multipliers):
        for _ in range(num_blocks):
            number += 1
            block(f'input_blocks.{number}.0', width, channels * multiplier)
            width = channels * multiplier
            if level in attention:
                attend(f'input_blocks.{number}.1', width)
            kept.append(width)
        if level < len(multipliers) - 1:
            number += 1
            if updown:
                block(f'input_blocks.{number}.0', width, width)
            else:
                affine(f'input_blocks.{number}.0.op', width, width, 3, 3)
            kept.append(width)
    block('middle_block.0', width, width)
    attend('middle_block.1', width)
    block('middle_block.2', width, width)
    number = 0
    for level in reversed(range(len(multipliers))):
        for i in range(num_blocks + 1):
            block(f'output_blocks.{number}.0', width + kept.pop(), channels * multipliers[level])
            width = channels * multipliers[level]
            if level in attention:
                attend(f'output_blocks.{number}.1', width)
            if level and i == num_blocks:
                name = f'output_blocks.{number}.{1 + (level in attention)}'
                if updown:
                    block(name, width, width)
                else:
                    affine(f'{name}.conv', width, width, 3, 3)
            number += 1
    affine('out.0', width)
    affine('out.2', out_channels, width, 3, 3)
    return found


class Network:
    """The network that a state dict describes: heads(width) → heads, and whether it has the new order of channels."""

    def __init__(self, state, *, num_blocks, heads, new_order=False, time_scale=1.0, groups=32):
        self.state, self.num_blocks, self.heads = state, num_blocks, heads
        self.new_order, self.time_scale, self.groups = new_order, time_scale, groups

    def has(self, prefix):
        return f'{prefix}.weight' in self.state

    def pair(self, name):
        return self.state[f'{name}.weight'], self.state[f'{name}.bias']

    def conv(self, name, x, **how):
        return functional.conv2d(x, *self.pair(name), **how)

    def norm(self, name, x):
        return functional.group_norm(x, self.groups, *self.pair(name), eps=1e-5)

    def block(self, name, x, emb, resize=lambda x: x):
        h = self.conv(f'{name}.in_layers.2', resize(functional.silu(self.norm(f'{name}.in_layers.0', x))), padding=1)
        given = functional.linear(functional.silu(emb), *self.pair(f'{name}.emb_layers.1'))[..., None, None]
        if given.shape[1] == 2 * h.shape[1]:
            scale, shift = given.chunk(2, dim=1)
            h = self.norm(f'{name}.out_layers.0', h) * (1 + scale) + shift
        else:
            h = self.norm(f'{name}.out_layers.0', h + given)
        h = self.conv(f'{name}.out_layers.3', functional.silu(h), padding=1)
        x = resize(x)
        return h + (self.conv(f'{name}.skip_connection', x) if self.has(f'{name}.skip_connection') else x)

    def attend(self, name, x):
        batch, width, *size = x.shape
        heads = self.heads(width)
        qkv = functional.conv1d(self.norm(f'{name}.norm', x).flatten(2), *self.pair(f'{name}.qkv'))
        if self.new_order:
            query, key, value = qkv.unflatten(1, (3, heads, width // heads)).unbind(1)
        else:
            query, key, value = qkv.unflatten(1, (heads, 3, width // heads)).unbind(2)
        faint = (width // heads) ** -0.25  # of queries and of keys
        weights = torch.einsum('bhct,bhcs->bhts', query * faint, key * faint).softmax(-1)
        mixed = torch.einsum('bhts,bhcs->bhct', weights, value).reshape(batch, width, -1)
        return x + functional.conv1d(mixed, *self.pair(f'{name}.proj_out')).unflatten(2, size)

    def step(self, prefix, x, emb, resize):
        """All layers of one entry of input_blocks, middle_block or output_blocks."""
        layers = sorted({name[len(prefix) + 1 :].split('.')[0] for name in self.state if name.startswith(prefix + '.')})
        for layer in layers:
            name = f'{prefix}.{layer}'
            if self.has(f'{name}.qkv'):
                x = self.attend(name, x)
            elif self.has(f'{name}.op'):
                x = self.conv(f'{name}.op', x, stride=2, padding=1)
            elif self.has(f'{name}.conv'):
                x = self.conv(f'{name}.conv', functional.interpolate(x, scale_factor=2, mode='nearest'), padding=1)
            elif self.has(f'{name}.in_layers.0'):
                x = self.block(name, x, emb, resize(layer))
            else:
                x = self.conv(name, x, padding=1)
        return x

    def __call__(self, x, t, labels=None):
        width = self.state['time_embed.0.weight'].shape[1]
        rates = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
        angles = (t.float() * self.time_scale)[:, None] * rates
        emb = functional.linear(torch.cat([angles.cos(), angles.sin()], dim=1), *self.pair('time_embed.0'))
        emb = functional.linear(functional.silu(emb), *self.pair('time_embed.2'))
        if labels is not None:
            emb = emb + self.state['label_emb.weight'][labels]

        def same(x):
            return x

        def half(x):
            return functional.avg_pool2d(x, 2)

        def double(x):
            return functional.interpolate(x, scale_factor=2)

        def count(kind):
            return 1 + max(int(name.split('.')[1]) for name in self.state if name.startswith(f'{kind}_blocks'))

        kept = []
        for i in range(count('input')):
            between = i > 0 and i % (self.num_blocks + 1) == 0
            x = self.step(f'input_blocks.{i}', x, emb, lambda layer, between=between: half if between else same)
            kept.append(x)
        x = self.step('middle_block', x, emb, lambda layer: same)
        for i in range(count('output')):
            x = torch.cat([x, kept.pop()], dim=1)
            x = self.step(f'output_blocks.{i}', x, emb, lambda layer: same if layer == '0' else double)
        return self.conv('out.2', functional.silu(self.norm('out.0', x)), padding=1)
