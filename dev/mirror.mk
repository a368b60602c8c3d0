.PHONY: mirror images

mirror: ## Fill the release mirror: documents, programs, container images and the base root file system.
	dev/mirror/build
	dev/mirror/base
	dev/mirror/redhat

images: ## Build the operator's and the builder's container images and load them into the development cluster.
	dev/images/build
	dev/images/load
