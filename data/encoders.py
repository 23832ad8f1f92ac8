"""The two text encoders and the VAE's encoder, described by the files that they lie in. load() makes them compute.

Nothing here imports torch, so that a precompute that finds nothing missing ends within a second.
"""

from data.common.imports import lean
from data.models.files import dtype_name
from data.models.identity import fingerprint


class TextEncoders:
    """Both CLIPs as SDXL uses them.

    text_shape    of a caption's penultimate hidden states of both, side by side: (77, 768 + 1280)
    pooled_shape  of the projected output of the second one: (1280,)
    """

    def __init__(self, model, precision):
        self.model, self.precision = model, precision
        self.tokenizer_components = [model.component(name) for name in ("tokenizer", "tokenizer_2")]
        self.encoder_components = [model.component(name) for name in ("text_encoder", "text_encoder_2")]
        configs = [component.config() for component in self.encoder_components]
        self.text_shape = (configs[0]["max_position_embeddings"], sum(config["hidden_size"] for config in configs))
        self.pooled_shape = (configs[1]["projection_dim"],)

    def fingerprint(self, identities):
        """What an embedding depends on besides its caption. identities: of the model's components, by name."""
        parts = self.tokenizer_components + self.encoder_components
        return "-".join([*(fingerprint(identities[part.name]) for part in parts), self.precision])

    def load(self, device):
        """-> LoadedTextEncoders. Raises UserError when they cannot tell two captions apart."""
        with lean():
            from data.loaded import LoadedTextEncoders

        return LoadedTextEncoders(self, device)


class VAE:
    """The encoder half of the VAE: pixels -> posteriors, the mean and standard deviation of every latent."""

    def __init__(self, model, precision):
        self.model, self.component = model, model.component("vae")
        self.config = self.component.config()
        # SDXL's own VAE overflows in fp16, and its config says so; the fp16-fix one's says that it does not
        self.precision = "no" if precision == "fp16" and self.config["force_upcast"] else precision

    def fingerprint(self, identities):
        """What a posterior depends on besides its picture. identities: of the model's components, by name."""
        return f"{fingerprint(identities['vae'])}-torch.{dtype_name(self.precision)}"

    def posterior_shape(self, bucket):
        """(height, width) in pixels -> the shape of a posterior, (2, 4, h, w)."""
        factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        return (2, self.config["latent_channels"], bucket[0] // factor, bucket[1] // factor)

    def load(self, device):
        """-> LoadedVAE"""
        with lean():
            from data.loaded import LoadedVAE

        return LoadedVAE(self, device)
