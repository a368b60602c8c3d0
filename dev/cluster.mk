.PHONY: dev-up dev-down dev-check

dev-up: ## Brings the development cluster up; quick when it is up.
	dev/up

dev-down: ## Takes it down; nothing of it stays on the machine but a cache.
	dev/down
	dev/check-clean

dev-check: ## Checks the development cluster itself: what works in it, and that nothing of it stays.
	dev/down
	dev/cluster/lifecycle
	dev/cluster/check
