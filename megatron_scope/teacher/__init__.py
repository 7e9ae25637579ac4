"""A teacher behind servers, SGLang or the embedded one: log-probs of given responses."""
