"""Recipes, one a file, in folders by family. Each is found by its file's name (`rlhf-dist run ppo`).

    supervised          imitation of given responses
    policy_gradient     rewards of the policy's own responses
    preference          losses on preferences that are given
    online_preference   responses drawn, compared and learned from; self-play and games
    reward_models       what scores or compares responses
    distillation        a student that learns from the distributions of teachers
    constrained         several objectives at a time
    reasoning           verifiable rewards with curricula, hints, votes
    agents              environments, tools, search, writers of prompts
    search              trees of responses: preferences and values of steps, search with them
    evaluation          measurements; nothing learns
    systems             whole pipelines, as files of stages

A family is a package whose docstring says what it holds. A recipe has the usual settings; what differs stands in a
YAML file beside it. `PAPERS` says what it is made from, and which rows of settings on it are other papers: `dpo/ipo`.
`_name.py` is no recipe: what the recipes of a family share.
"""
