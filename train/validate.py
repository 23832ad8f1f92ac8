"""Looking at what was learned while it is learned: when, and the loss on pictures that were held out."""


def due(settings, done):
    """Whether it is time to look after `done` optimizer steps: at every regular save, and every --validation_steps."""
    every = settings.checkpointing_steps, settings.validation_steps or settings.checkpointing_steps
    return done == settings.max_train_steps or any(done % steps == 0 for steps in every)
