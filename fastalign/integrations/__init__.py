"""fastalign inside other libraries' trainers: transformers (`fastalign.patch`) and TRL (`integrations.trl.accelerate_trainer`)."""
