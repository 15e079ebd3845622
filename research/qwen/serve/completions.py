"""Placeholder of the router; its owner replaces it."""

from fastapi import APIRouter

router = APIRouter()
