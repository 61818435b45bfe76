"""Vision-language models of transformers as hosts: methods that steer how they look at the image, and what they see."""
