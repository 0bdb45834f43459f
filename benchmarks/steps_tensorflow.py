"""A worker of ``benchmarks.training`` that takes steps of the post's recipe in TensorFlow.

It takes one training step per line of its input. ``python -m benchmarks.steps_tensorflow eager``
runs the step operation by operation, as the post does; ``compiled`` runs it as one tf.function.
Needs numpy, tensorflow, tf-keras and tensorflow-probability, and only ``vqref`` of this project.
"""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

from benchmarks.measure import serve
from vqref.families import post
from vqref.spec import Layer, ModelSpec

BATCH, BETA, DECAY, EPSILON = 64, 0.25, 0.99, 1e-5


def keras(layer: Layer) -> Any:
    """Returns a row of the table as a layer of Keras."""
    if layer.kind == "reshape":
        channels, *size = layer.out_shape
        return tf_keras.layers.Reshape((*size, channels))  # Keras has channels last
    if layer.kind == "dense":
        return tf_keras.layers.Dense(layer.out_shape[0])
    kind = tf_keras.layers.Conv2D if layer.kind == "conv" else tf_keras.layers.Conv2DTranspose
    padding = "same" if any(map(any, layer.pads)) else "valid"
    activation = None if layer.activation == "linear" else layer.activation
    return kind(layer.out_shape[0], layer.kernel, layer.stride, padding, activation=activation)


class Post:
    """Encoder, vector quantizer with moving averages, decoder and Bernoulli likelihood."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        rows = [row for row in spec.encoder if row.kind != "reshape"]
        self.encoder = tf_keras.Sequential(
            [*map(keras, rows[:-1]), tf_keras.layers.Flatten(), keras(rows[-1])]
        )
        self.decoder = tf_keras.Sequential(list(map(keras, spec.decoder)))
        self.codebook = tf.Variable(
            tf.random.normal((spec.num_codes, spec.code_size)), trainable=False
        )
        self.count = tf.Variable(tf.zeros(spec.num_codes), trainable=False)
        self.means = tf.Variable(self.codebook, trainable=False)
        self.prior = tfp.distributions.Multinomial(
            1, logits=tf.zeros((spec.latent_size, spec.num_codes))
        )
        self.optimizer = tf_keras.optimizers.Adam(1e-3)
        self.images = tf.random.uniform((BATCH, *spec.image_shape[1:], spec.image_shape[0]))

    def step(self) -> None:
        with tf.GradientTape() as tape:
            latents = tf.reshape(
                self.encoder(self.images), (-1, self.spec.latent_size, self.spec.code_size)
            )
            distances = tf.norm(latents[:, :, None] - self.codebook, axis=3)
            chosen = tf.one_hot(tf.argmin(distances, axis=2), self.spec.num_codes)
            quantized = tf.reduce_sum(chosen[..., None] * self.codebook, axis=2)
            straight_through = latents + tf.stop_gradient(quantized - latents)
            logits = self.decoder(
                tf.reshape(straight_through, (-1, self.spec.latent_size * self.spec.code_size))
            )
            pixels = tfp.distributions.Independent(tfp.distributions.Bernoulli(logits=logits), 3)
            reconstruction = -tf.reduce_mean(pixels.log_prob(self.images))
            commitment = tf.reduce_mean(tf.square(latents - tf.stop_gradient(quantized)))
            prior = -tf.reduce_mean(tf.reduce_sum(self.prior.log_prob(chosen), 1))
            loss = reconstruction + BETA * commitment + prior
        learned = self.encoder.trainable_variables + self.decoder.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, learned), learned, strict=True))
        self.count.assign(DECAY * self.count + (1 - DECAY) * tf.reduce_sum(chosen, axis=(0, 1)))
        hit = tf.reduce_sum(latents[:, :, None] * chosen[..., None], axis=(0, 1))
        self.means.assign(DECAY * self.means + (1 - DECAY) * hit)
        self.codebook.assign(self.means / (self.count[:, None] + EPSILON))


if __name__ == "__main__":
    model = Post(post())
    run = {"eager": model.step, "compiled": tf.function(model.step)}[sys.argv[1]]
    run()
    serve(run, tensorflow=tf.__version__, probability=tfp.__version__)
