"""maitred's connection to PID 1, made when it is first needed and again when it is lost."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.process_supervisor.client import AsyncClient


class SupervisorConnection:
    """Hands out the one AsyncClient that all calls share."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._client: AsyncClient | None = None
        self._connecting = asyncio.Lock()

    async def client(self) -> AsyncClient:
        """A client that is connected. Raises SupervisorGone."""
        from agent.process_supervisor.client import AsyncClient

        async with self._connecting:
            if self._client is None or not self._client.connected:
                if self._client is not None:
                    await self._client.close()
                self._client = await AsyncClient.connect(self._run_dir)
            return self._client

    async def close(self) -> None:
        """Ends the connection; calls that wait on it raise SupervisorGone."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
