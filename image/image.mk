# The guest image and the container images. What is up to date is found out by image/ itself, from
# the content of everything that goes in.

IMAGE := PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m image

.PHONY: image
image: venv ## build/image: kernel, initrd, root filesystem; KERNEL=generic for 9p and USB
	@$(IMAGE) guest

.PHONY: container-image
container-image: build/.packages ## build/container-image: the containers' images
	@$(IMAGE) containers
